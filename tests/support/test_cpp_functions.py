"""What the counter of C++ functions takes for a function, and how long it finds it."""

from support.cpp_functions import functions

SOURCE = r"""
#define OPEN {
namespace a::b {
struct Pair { int first = 0; int sum() const { return first; } };
constexpr Table kTable = make({1, 2});
const int kValues[] = {1, 2};
enum class Kind { kOne };

// A brace in a comment: {
template <template <class> class Kernel, class T>
__attribute__((noinline)) void nested(const T& x) {
    auto lambda = [&](int y) { return y; };
    for (;;) {
        if (x) { puts("}{"); }
    }
}

struct alignas(64) Made {
    Made(int x, int y) : x_{x}, y_(y) {
        check(x);
    }
    bool operator()(int x) {
        return x == '}';
    }
};

__global__ void __launch_bounds__(128) kernel(
    int x) {
}
const char* text() { return R"({{)"; }
std::vector<int> defaulted(int x = 3) {
    return {x};
}
extern "C" void exported() {
}
}  // namespace a::b
"""


def test_every_function_and_nothing_else_is_counted():
    assert list(functions(SOURCE)) == [
        ("sum", 1),
        ("nested", 7),
        ("Made", 3),
        ("operator()", 3),
        ("kernel", 3),
        ("text", 1),
        ("defaulted", 3),
        ("exported", 2),
    ]
