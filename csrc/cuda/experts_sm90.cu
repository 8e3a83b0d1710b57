// Both products of the expert layer for Hopper: persistent CTAs stream weights through a TMA ring
// that does not drain between tiles or experts. Weights are the 64-row operand of wgmma, tokens its
// 8..64 columns, so that the instruction is full however few tokens an expert has.
#include <cuda_bf16.h>

#include "hopper.cuh"
#include "launchers.h"
#include "layout.h"

namespace moesd {
namespace {

constexpr int kConsumers = 128;  // one warp group
constexpr int kThreads = kConsumers + 32;
// Two CTAs share a multiprocessor: each ring and its alignment stay below half of its 227 KB.
constexpr int kCtasPerSm = 2;
constexpr int kRingBytes = 104 * 1024;

template <int N>
struct Ring {
    static constexpr int kTokenBytes = N * kRowBytes;
    static constexpr int kStageBytes = kWeightTiles * kWeightTileBytes + kTokenBytes;
    static constexpr int kStages = kRingBytes / kStageBytes;
    // Operands begin at multiples of 1024 bytes: the swizzle's period.
    static_assert(kStageBytes % 1024 == 0);
    static constexpr int kSharedBytes = kStages * kStageBytes + 1024 + 2 * kStages * 8;
};

struct Product {
    int num_blocks;  // bound; idle blocks come last
    int tiles_per_block;
    int k_tiles;
    int rows_per_expert;  // of the weight matrix: 2I or H
    int I, H;
    Plan plan;
    __nv_bfloat16* act;
    float* partial;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ float silu(float x) { return x / (1.f + __expf(-x)); }

// Every CTA's next tile, the same for its producer and its consumers.
struct Tiles {
    const Product& product;
    int used;  // blocks that have rows
    int index = static_cast<int>(blockIdx.x);
    Work work{};
    Block block{};

    __device__ bool next() {
        if (index >= used * product.tiles_per_block) return false;
        work = work_of(index, product.tiles_per_block, used);
        const int* const entry = product.plan.blocks + 3 * work.block;
        block = {entry[0], entry[1], entry[2]};
        index += gridDim.x;
        return true;
    }
};

// Blocks in use, which lie before the idle ones. Every thread of the CTA takes part, and waits for
// the others.
__device__ int count_used(const Product& product) {
    int used = 0;
    for (int first = 0; first < product.num_blocks; first += kThreads) {
        const int block = first + static_cast<int>(threadIdx.x);
        used +=
            __syncthreads_count(block < product.num_blocks && product.plan.blocks[3 * block] >= 0);
    }
    return used;
}

template <int N, bool kGateUp>
__device__ void produce(const CUtensorMap* weights, const CUtensorMap* tokens,
                        const Product& product, int used, char* ring, uint64_t* full,
                        uint64_t* empty) {
    using R = Ring<N>;
    const uint64_t weight_policy = evict_first_policy(), token_policy = evict_last_policy();
    PipelineState state;
    Tiles tiles{product, used};
    while (tiles.next()) {
        const int row0 =
            first_weight_row(tiles.block.expert, product.rows_per_expert, tiles.work.tile, kGateUp);
        const int row1 = second_weight_row(row0, product.I, kGateUp);
        for (int k = 0; k < product.k_tiles; ++k) {
            char* const stage = ring + state.index * R::kStageBytes;
            // A ring starts empty: the phase before the first counts as complete.
            barrier_wait(&empty[state.index], state.phase ^ 1);
            barrier_expect(&full[state.index], R::kStageBytes);
            tensor_copy(stage, weights, k * kTileK, row0, &full[state.index], weight_policy);
            tensor_copy(stage + kWeightTileBytes, weights, k * kTileK, row1, &full[state.index],
                        weight_policy);
            tensor_copy(stage + kWeightTiles * kWeightTileBytes, tokens, k * kTileK,
                        tiles.block.first_row, &full[state.index], token_policy);
            state.advance(R::kStages);
        }
    }
}

// Writes a tile's valid rows; D is [64 weight rows, N tokens] spread over the warp group's
// registers.
template <int N, bool kGateUp>
__device__ void store(const Product& product, const Tiles& tiles, const float (&d0)[N / 2],
                      const float (&d1)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        const int token = fragment_column(threadIdx.x, i);
        const int row = fragment_row(threadIdx.x, i);
        if (token >= tiles.block.rows) continue;
        const int64_t sorted = tiles.block.first_row + token;
        if constexpr (kGateUp) {
            const int column = tiles.work.tile * kTileRows + row;
            const float value = silu(d0[i]) * d1[i];
            product.act[sorted * product.I + column] = __float2bfloat16_rn(value);
        } else {
            const int column = tiles.work.tile * kWeightTiles * kTileRows + row;
            float* const out =
                product.partial + int64_t{product.plan.sorted_to_pair[sorted]} * product.H + column;
            out[0] = d0[i];
            // H is a multiple of 64, not of 128.
            if (column + kTileRows < product.H) out[kTileRows] = d1[i];
        }
    }
}

// A warp waits for its own rows' products only: each of the four says that it is done with a stage.
__device__ void release(uint64_t* empty) {
    if (threadIdx.x % 32 == 0) barrier_arrive(empty);
}

template <int N, bool kGateUp>
__device__ void consume(const Product& product, int used, char* ring, uint64_t* full,
                        uint64_t* empty) {
    using R = Ring<N>;
    PipelineState state;
    Tiles tiles{product, used};
    while (tiles.next()) {
        float d0[N / 2] = {}, d1[N / 2] = {};
        int previous = -1;
        for (int k = 0; k < product.k_tiles; ++k) {
            const uint32_t stage = shared_address(ring + state.index * R::kStageBytes);
            const uint64_t w0 = matrix_descriptor(stage);
            const uint64_t w1 = matrix_descriptor(stage + kWeightTileBytes);
            const uint64_t x = matrix_descriptor(stage + kWeightTiles * kWeightTileBytes);
            barrier_wait(&full[state.index], state.phase);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kTileK / 16; ++step) {
                const uint64_t offset = step * kDescriptorStep;
                const int add = k > 0 || step > 0;
                wgmma(d0, w0 + offset, x + offset, add);
                wgmma(d1, w1 + offset, x + offset, add);
            }
            wgmma_commit();
            // All but the newest group are complete, so the stage before this one may be refilled.
            wgmma_wait<1>();
            if (previous >= 0) release(&empty[previous]);
            previous = state.index;
            state.advance(R::kStages);
        }
        wgmma_wait<0>();
        release(&empty[previous]);
        store<N, kGateUp>(product, tiles, d0, d1);
    }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// Grid: kCtasPerSm CTAs a multiprocessor; warp 4 copies, warps 0..3 multiply.
template <int N, bool kGateUp>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    product_kernel(const __grid_constant__ CUtensorMap weights,
                   const __grid_constant__ CUtensorMap tokens, const Product product) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using R = Ring<N>;
    extern __shared__ char shared[];
    char* const ring = shared + (1024 - shared_address(shared) % 1024) % 1024;
    auto* const full = reinterpret_cast<uint64_t*>(ring + R::kStages * R::kStageBytes);
    uint64_t* const empty = full + R::kStages;
    if (threadIdx.x == 0) {
        for (int i = 0; i < R::kStages; ++i) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], kConsumers / 32);
        }
        barrier_init_fence();
    }
    __syncthreads();
    const int used = count_used(product);
    if (threadIdx.x >= kConsumers) {
        if (threadIdx.x == kConsumers) {
            prefetch_descriptor(&weights);
            prefetch_descriptor(&tokens);
            produce<N, kGateUp>(&weights, &tokens, product, used, ring, full, empty);
        }
    } else {
        consume<N, kGateUp>(product, used, ring, full, empty);
    }
#else
    // Compiled for another architecture: fail rather than leave the result unwritten.
    __trap();
#endif
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, found at run time so that nothing links against the driver.
EncodeTiled encode_tiled() {
    static const EncodeTiled function = [] {
        void* pointer = nullptr;
        cudaDriverEntryPointQueryResult status;
        const cudaError_t error = cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &status);
        return error == cudaSuccess && status == cudaDriverEntryPointSuccess
                   ? reinterpret_cast<EncodeTiled>(pointer)
                   : nullptr;
    }();
    return function;
}

// A [rows, columns] bf16 matrix read in boxes of [box_rows, 64], swizzled; rows past the end read
// as zero.
cudaError_t make_map(CUtensorMap* map, const void* data, int64_t rows, int64_t columns,
                     int box_rows) {
    const EncodeTiled encode = encode_tiled();
    if (encode == nullptr) return cudaErrorNotSupported;
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns) * 2};
    const cuuint32_t box[2] = {kTileK, static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t steps[2] = {1, 1};
    const CUresult result =
        encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, strides,
               box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <int N, bool kGateUp>
cudaError_t launch_product(const void* weights, int64_t weight_rows, const void* tokens,
                           const Experts& e, int sms, cudaStream_t stream) {
    const int K = kGateUp ? e.H : e.I;
    CUtensorMap weight_map, token_map;
    cudaError_t error = make_map(&weight_map, weights, weight_rows, K, kTileRows);
    if (error != cudaSuccess) return error;
    error = make_map(&token_map, tokens, e.pairs, K, N);
    if (error != cudaSuccess) return error;
    const int tile_rows = kGateUp ? kTileRows : kWeightTiles * kTileRows;
    const Product product{e.num_blocks, ceil_div(kGateUp ? e.I : e.H, tile_rows),
                          K / kTileK,   kGateUp ? 2 * e.I : e.H,
                          e.I,          e.H,
                          e.plan,       static_cast<__nv_bfloat16*>(e.act),
                          e.partial};
    const auto kernel = product_kernel<N, kGateUp>;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 Ring<N>::kSharedBytes);
    if (error != cudaSuccess) return error;
    const int grid = min(kCtasPerSm * sms, product.num_blocks * product.tiles_per_block);
    kernel<<<grid, kThreads, Ring<N>::kSharedBytes, stream>>>(weight_map, token_map, product);
    return cudaGetLastError();
}

template <int N>
cudaError_t launch(const Experts& e, int sms, cudaStream_t stream) {
    const int64_t gate_up_rows = int64_t{e.E} * 2 * e.I, down_rows = int64_t{e.E} * e.H;
    const cudaError_t error =
        launch_product<N, true>(e.w_gate_up, gate_up_rows, e.x_sorted, e, sms, stream);
    if (error != cudaSuccess) return error;
    return launch_product<N, false>(e.w_down, down_rows, e.act, e, sms, stream);
}

}  // namespace

cudaError_t launch_experts_sm90(const Experts& e, cudaStream_t stream) {
    int device = 0, major = 0, sms = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (major != 9) return cudaErrorNotSupported;
    if (e.H % kTileK != 0 || e.I % kTileK != 0) return cudaErrorInvalidValue;
    switch (e.block_rows) {
        case 8: return launch<8>(e, sms, stream);
        case 16: return launch<16>(e, sms, stream);
        case 32: return launch<32>(e, sms, stream);
        case 64: return launch<64>(e, sms, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace moesd
