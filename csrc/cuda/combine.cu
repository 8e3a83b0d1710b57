// Weighted sum of a token's expert outputs, in order of k and in fp32; and the gather that feeds
// the experts.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launchers.h"
#include "layout.h"

namespace moesd {
namespace {

constexpr int kThreads = 128;
constexpr int kVector = 4;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void from_float(float x, float& y) { y = x; }
__device__ void from_float(float x, __half& y) { y = __float2half_rn(x); }
__device__ void from_float(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }

// Grid: (T, H / (128 * 4)); a thread sums four columns. A pair whose id is outside [0, E) was never
// computed: its partial is not read and its weight not multiplied.
template <typename Id, typename Weight, typename Out>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const float* __restrict__ partial, const Id* __restrict__ ids,
                   const Weight* __restrict__ weights, Out* __restrict__ out, int topk, int E,
                   int H) {
    const int64_t token = blockIdx.x;
    const int column = (blockIdx.y * kThreads + threadIdx.x) * kVector;
    if (column >= H) return;
    float sum[kVector] = {};
    for (int k = 0; k < topk; ++k) {
        const int64_t pair = token * topk + k;
        const Id id = ids[pair];
        if (id < 0 || id >= E) continue;
        const float weight = to_float(weights[pair]);
        const float* const row = partial + pair * H + column;
        if (H % kVector == 0) {
            const float4 value = *reinterpret_cast<const float4*>(row);
            sum[0] = fmaf(weight, value.x, sum[0]);
            sum[1] = fmaf(weight, value.y, sum[1]);
            sum[2] = fmaf(weight, value.z, sum[2]);
            sum[3] = fmaf(weight, value.w, sum[3]);
        } else {
            for (int j = 0; j < kVector && column + j < H; ++j) {
                sum[j] = fmaf(weight, row[j], sum[j]);
            }
        }
    }
    for (int j = 0; j < kVector && column + j < H; ++j) {
        from_float(sum[j], out[token * H + column + j]);
    }
}

// Grid: (num_blocks * block_rows); a CTA copies one row, 16 bytes a thread at a time. H is a
// multiple of 8.
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __nv_bfloat16* __restrict__ x, int64_t x_stride, Plan plan, int block_rows,
                  int topk, int H, __nv_bfloat16* __restrict__ sorted) {
    const int* const block = plan.blocks + 3 * (blockIdx.x / block_rows);
    const int row = blockIdx.x % block_rows;
    if (row >= block[2]) return;
    const int64_t sorted_row = block[1] + row;
    const int64_t token = plan.sorted_to_pair[sorted_row] / topk;
    const auto* const source = reinterpret_cast<const uint4*>(x + token * x_stride);
    auto* const target = reinterpret_cast<uint4*>(sorted + sorted_row * H);
    for (int i = threadIdx.x; i < H / 8; i += kThreads) target[i] = source[i];
}

struct Call {
    const float* partial;
    const void *ids, *weights;
    void* out;
    int T, topk, E, H;
    cudaStream_t stream;
};

template <typename Id, typename Weight, typename Out>
void launch(const Call& c) {
    const dim3 grid(c.T, ceil_div(c.H, kThreads * kVector));
    combine_kernel<<<grid, kThreads, 0, c.stream>>>(c.partial, static_cast<const Id*>(c.ids),
                                                    static_cast<const Weight*>(c.weights),
                                                    static_cast<Out*>(c.out), c.topk, c.E, c.H);
}

template <typename Id, typename Weight>
void launch(const Call& c, Float out) {
    if (out == Float::kBf16) launch<Id, Weight, __nv_bfloat16>(c);
    if (out == Float::kFp16) launch<Id, Weight, __half>(c);
    if (out == Float::kFp32) launch<Id, Weight, float>(c);
}

template <typename Id>
void launch(const Call& c, Float weights, Float out) {
    if (weights == Float::kBf16) launch<Id, __nv_bfloat16>(c, out);
    if (weights == Float::kFp16) launch<Id, __half>(c, out);
    if (weights == Float::kFp32) launch<Id, float>(c, out);
}

}  // namespace

cudaError_t launch_combine(const float* partial, const void* ids, bool ids_are_int64,
                           const void* weights, Float weights_type, void* out, Float out_type,
                           int T, int topk, int experts, int H, cudaStream_t stream) {
    const Call call{partial, ids, weights, out, T, topk, experts, H, stream};
    if (ids_are_int64) {
        launch<int64_t>(call, weights_type, out_type);
    } else {
        launch<int32_t>(call, weights_type, out_type);
    }
    return cudaGetLastError();
}

cudaError_t launch_gather(const void* x, int64_t x_stride, Plan plan, int num_blocks,
                          int block_rows, int topk, int H, void* sorted, cudaStream_t stream) {
    if (H % 8 != 0) return cudaErrorInvalidValue;
    gather_kernel<<<num_blocks * block_rows, kThreads, 0, stream>>>(
        static_cast<const __nv_bfloat16*>(x), x_stride, plan, block_rows, topk, H,
        static_cast<__nv_bfloat16*>(sorted));
    return cudaGetLastError();
}

}  // namespace moesd
