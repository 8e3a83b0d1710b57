#pragma once

namespace moesd::MOESD_ISA {

// f.template operator()<count>(), for 1 <= count <= M: kernels are compiled for each size of a
// tile.
template <int M, class F>
inline void for_size(int count, const F& f) {
    if constexpr (M > 1) {
        if (count < M) return for_size<M - 1>(count, f);
    }
    f.template operator()<M>();
}

}  // namespace moesd::MOESD_ISA
