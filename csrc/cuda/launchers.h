// Plain launchers of the CUDA kernels: raw pointers and a stream, no torch, so that nvcc compiles
// them anywhere. They have run on an H200; tests compile them and check their index arithmetic.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace moesd {

enum class Float : int { kBf16 = 0, kFp16 = 1, kFp32 = 2 };

// Pairs the single-CTA plan holds in shared memory.
constexpr int kMaxPlanPairs = 8192;
constexpr int kMaxPlanExperts = 1024;

struct Plan {
    int* sorted_to_pair;  // [pairs]; entries past the last valid pair are not written
    int* blocks;          // [max_blocks, 3] of (expert or -1, first sorted row, rows)
};

// Stable counting sort of ids [pairs] by expert; ids outside [0, experts) are dropped.
cudaError_t launch_plan(const void* ids, bool ids_are_int64, int pairs, int experts, int block_rows,
                        Plan plan, cudaStream_t stream);

// out[t] = sum over k, in order and in fp32, of weights[t, k] * partial[t * topk + k].
// partial [T * topk, H] fp32, ids and weights [T, topk], out [T, H].
cudaError_t launch_combine(const float* partial, const void* ids, bool ids_are_int64,
                           const void* weights, Float weights_type, void* out, Float out_type,
                           int T, int topk, int experts, int H, cudaStream_t stream);

// Rows of x [T, H] bf16 in sorted order -> sorted [pairs, H]; rows of idle blocks are not written.
cudaError_t launch_gather(const void* x, int64_t x_stride, Plan plan, int num_blocks,
                          int block_rows, int topk, int H, void* sorted, cudaStream_t stream);

struct Experts {
    const void* x_sorted;   // [pairs, H] bf16
    const void* w_gate_up;  // [E, 2I, H] bf16
    const void* w_down;     // [E, H, I] bf16
    void* act;              // [pairs, I] bf16 workspace
    float* partial;         // [pairs, H] fp32 result, rows in pair order
    Plan plan;
    int pairs, num_blocks, block_rows, E, H, I;
};

// silu(gate) * up, then down, for every block of the plan, on sm_90a; H and I multiples of 64,
// block_rows in {8, 16, 32, 64}. Returns cudaErrorNotSupported on any other architecture. The code
// must have been compiled for sm_90a.
cudaError_t launch_experts_sm90(const Experts& experts, cudaStream_t stream);

}  // namespace moesd
