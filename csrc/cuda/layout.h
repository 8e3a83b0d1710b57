// Index arithmetic of the CUDA kernels that needs no GPU:
// tests/moesd_kernels/experts/test_cuda_compile.py compiles it for the host and checks it against
// what the hardware does with the same numbers.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MOESD_BOTH __host__ __device__ __forceinline__
#else
#define MOESD_BOTH inline
#endif

namespace moesd {

// One wgmma takes 64 weight rows; a stage holds 64 columns of K, which is one 128-byte swizzled
// row.
constexpr int kTileRows = 64;
constexpr int kTileK = 64;
constexpr int kRowBytes = kTileK * 2;
constexpr int kWeightTileBytes = kTileRows * kRowBytes;
// A tile is two wgmma operands: 64 gate rows and their 64 up rows, or 128 rows of down.
constexpr int kWeightTiles = 2;

struct Block {
    int expert;     // -1 past the last block
    int first_row;  // in sorted order
    int rows;
};

// Where a persistent CTA's n-th piece of work lies.
struct Work {
    int block;
    int tile;
};

MOESD_BOTH int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Equal tiles of a group of blocks are adjacent: an expert's blocks lie next to each other in the
// plan, so CTAs that run at the same time read one weight tile, from DRAM once and then from the
// cache. Blocks are those in use; the last group may be smaller. (Idle ones in a group would leave
// the CTAs that meet them without work.)
constexpr int kGroupBlocks = 4;
MOESD_BOTH Work work_of(int index, int tiles_per_block, int blocks) {
    const int group = index / (kGroupBlocks * tiles_per_block);
    const int index_in_group = index - group * kGroupBlocks * tiles_per_block;
    const int remaining = blocks - group * kGroupBlocks;
    const int size = remaining < kGroupBlocks ? remaining : kGroupBlocks;
    return {group * kGroupBlocks + index_in_group % size, index_in_group / size};
}

// First row of each weight operand in the [E * rows_per_expert, K] matrix. gate_up pairs row j with
// row I + j.
MOESD_BOTH int first_weight_row(int expert, int rows_per_expert, int tile, bool gate_up) {
    return expert * rows_per_expert + tile * (gate_up ? kTileRows : kWeightTiles * kTileRows);
}
MOESD_BOTH int second_weight_row(int first, int I, bool gate_up) {
    return first + (gate_up ? I : kTileRows);
}

// Byte of element (row, k) in a tile that TMA wrote with the 128-byte swizzle: the 16-byte chunk's
// number is xor-ed with the row's number in its group of eight.
MOESD_BOTH uint32_t swizzled_offset(int row, int k) {
    const uint32_t chunk = static_cast<uint32_t>(k) / 8;
    return static_cast<uint32_t>(row) * kRowBytes +
           ((chunk ^ (static_cast<uint32_t>(row) & 7)) * 16) + (static_cast<uint32_t>(k) % 8) * 2;
}

// wgmma shared-memory descriptor of a K-major operand with 128-byte swizzle: address and the
// distance of eight-row groups in 16-byte units; the leading offset is not used by this layout.
MOESD_BOTH uint64_t matrix_descriptor(uint32_t shared_address) {
    constexpr uint64_t kGroupBytes = 8 * kRowBytes;
    constexpr uint64_t kSwizzle128 = 1;
    return static_cast<uint64_t>((shared_address & 0x3FFFF) >> 4) | (uint64_t{1} << 16) |
           ((kGroupBytes >> 4) << 32) | (kSwizzle128 << 62);
}

// A k16 step inside the swizzled row moves the descriptor's address by 32 bytes.
constexpr uint64_t kDescriptorStep = (16 * 2) >> 4;

// Element of the 64 x N result that register `i` of thread `thread` (of 128) holds.
MOESD_BOTH int fragment_row(int thread, int i) {
    return (thread / 32) * 16 + (thread % 32) / 4 + ((i % 4) / 2) * 8;
}
MOESD_BOTH int fragment_column(int thread, int i) { return (i / 4) * 8 + (thread % 4) * 2 + i % 2; }

// Which of a ring's stages comes next, and the parity that its barrier's next phase has.
struct PipelineState {
    int index = 0;
    uint32_t phase = 0;

    MOESD_BOTH void advance(int stages) {
        if (++index == stages) {
            index = 0;
            phase ^= 1;
        }
    }
};

// Most blocks any routing of `pairs` rows over `experts` can make.
MOESD_BOTH int max_blocks(int pairs, int experts, int block_rows) {
    const int active = pairs < experts ? pairs : experts;
    return active + (pairs - active) / block_rows;
}

}  // namespace moesd
