// Routing plan in one CTA: a stable counting sort of the routed pairs by expert, without atomics.
#include "launchers.h"
#include "layout.h"

namespace moesd {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

// A warp walks the ids in order; the ballot gives every match its place among the earlier ones.
// Calls emit(pair, rank) for each pair of `expert` and returns how many there are.
template <typename Emit>
__device__ int walk(const int* ids, int pairs, int expert, Emit emit) {
    const int lane = threadIdx.x % 32;
    const unsigned earlier_lanes = (1u << lane) - 1;
    int count = 0;
    for (int base = 0; base < pairs; base += 32) {
        const int pair = base + lane;
        const bool match = pair < pairs && ids[pair] == expert;
        const unsigned votes = __ballot_sync(0xffffffffu, match);
        if (match) emit(pair, count + __popc(votes & earlier_lanes));
        count += __popc(votes);
    }
    return count;
}

// Grid: one CTA. Shared: ids [pairs], then counts, row starts and block starts [E + 1].
template <typename Id>
__global__ void __launch_bounds__(kThreads)
    plan_kernel(const Id* __restrict__ topk_ids, int pairs, int E, int block_rows, int max_blocks,
                Plan plan) {
    extern __shared__ int shared[];
    int* const ids = shared;
    int* const counts = ids + pairs;
    int* const row_start = counts + E;
    int* const block_start = row_start + E + 1;
    for (int i = threadIdx.x; i < pairs; i += kThreads) {
        const Id id = topk_ids[i];
        ids[i] = id >= 0 && id < E ? static_cast<int>(id) : -1;
    }
    __syncthreads();
    const int warp = threadIdx.x / 32;
    for (int e = warp; e < E; e += kWarps) {
        const int count = walk(ids, pairs, e, [](int, int) {});
        if (threadIdx.x % 32 == 0) counts[e] = count;
    }
    __syncthreads();
    // E is a few hundred at most: one thread's prefix sum is shorter than a parallel one's
    // barriers.
    if (threadIdx.x == 0) {
        int rows = 0, blocks = 0;
        for (int e = 0; e < E; ++e) {
            row_start[e] = rows;
            block_start[e] = blocks;
            rows += counts[e];
            blocks += ceil_div(counts[e], block_rows);
        }
        row_start[E] = rows;
        block_start[E] = blocks;
    }
    __syncthreads();
    for (int e = warp; e < E; e += kWarps) {
        const int first = row_start[e];
        if (counts[e] > 0) {
            walk(ids, pairs, e,
                 [&](int pair, int rank) { plan.sorted_to_pair[first + rank] = pair; });
        }
        const int blocks = block_start[e + 1] - block_start[e];
        for (int j = threadIdx.x % 32; j < blocks; j += 32) {
            int* const entry = plan.blocks + 3 * (block_start[e] + j);
            entry[0] = e;
            entry[1] = first + j * block_rows;
            entry[2] = min(counts[e] - j * block_rows, block_rows);
        }
    }
    for (int block = block_start[E] + threadIdx.x; block < max_blocks; block += kThreads) {
        plan.blocks[3 * block] = -1;
        plan.blocks[3 * block + 1] = row_start[E];
        plan.blocks[3 * block + 2] = 0;
    }
}

template <typename Id>
cudaError_t launch(const void* ids, int pairs, int E, int block_rows, Plan plan,
                   cudaStream_t stream) {
    const size_t shared = sizeof(int) * (pairs + 3 * E + 2);
    const int bound = max_blocks(pairs, E, block_rows);
    plan_kernel<<<1, kThreads, shared, stream>>>(static_cast<const Id*>(ids), pairs, E, block_rows,
                                                 bound, plan);
    return cudaGetLastError();
}

}  // namespace

cudaError_t launch_plan(const void* ids, bool ids_are_int64, int pairs, int experts, int block_rows,
                        Plan plan, cudaStream_t stream) {
    // 8192 pairs and 1024 experts stay below the 48 KB every kernel may use without asking.
    if (pairs > kMaxPlanPairs || experts > kMaxPlanExperts) return cudaErrorInvalidValue;
    return ids_are_int64 ? launch<int64_t>(ids, pairs, experts, block_rows, plan, stream)
                         : launch<int32_t>(ids, pairs, experts, block_rows, plan, stream);
}

}  // namespace moesd
