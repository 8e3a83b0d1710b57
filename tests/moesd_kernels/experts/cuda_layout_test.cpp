// Host program of test_cuda_compile.py: the CUDA kernels' index arithmetic against a model of the
// hardware.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <vector>

#include "../../../csrc/cuda/layout.h"

using namespace moesd;

#define CHECK(condition, ...)                               \
    if (!(condition)) {                                     \
        std::printf("line %d: %s: ", __LINE__, #condition); \
        std::printf(__VA_ARGS__);                           \
        std::printf("\n");                                  \
        std::exit(1);                                       \
    }

// The hardware's 128-byte swizzle: bits 4..6 of an address are xor-ed with bits 7..9.
uint32_t hardware_swizzle(uint32_t address) { return address ^ (((address >> 7) & 7) << 4); }

void swizzle_is_the_hardwares() {
    std::set<uint32_t> seen;
    for (int row = 0; row < kTileRows; ++row) {
        for (int k = 0; k < kTileK; ++k) {
            const uint32_t offset = swizzled_offset(row, k);
            const uint32_t linear = row * kRowBytes + k * 2;
            CHECK(offset == hardware_swizzle(linear), "row %d k %d: %u", row, k, offset);
            seen.insert(offset);
        }
    }
    CHECK(seen.size() == kTileRows * kTileK, "%zu distinct offsets", seen.size());
}

// What wgmma reads for element (row, k16 column) of a K-major operand given a descriptor: groups of
// eight rows at the stride offset, rows 128 bytes apart, and the swizzle on the final address.
uint32_t hardware_read(uint64_t descriptor, int row, int k) {
    const uint32_t base = static_cast<uint32_t>(descriptor & 0x3FFF) << 4;
    const uint32_t group = static_cast<uint32_t>((descriptor >> 32) & 0x3FFF) << 4;
    CHECK((descriptor >> 62) == 1, "layout %llu is not the 128-byte swizzle",
          (unsigned long long)(descriptor >> 62));
    CHECK(((descriptor >> 49) & 7) == 0,
          "base offset must be 0 for operands at multiples of 1024 bytes");
    return hardware_swizzle(base + (row / 8) * group + (row % 8) * kRowBytes + k * 2);
}

void descriptors_read_what_tma_wrote() {
    for (uint32_t base = 1024; base < 200 * 1024; base += 37 * 1024) {
        for (int step = 0; step < kTileK / 16; ++step) {
            const uint64_t descriptor = matrix_descriptor(base) + step * kDescriptorStep;
            for (int row = 0; row < kTileRows; ++row) {
                for (int k = 0; k < 16; ++k) {
                    const uint32_t expected = base + swizzled_offset(row, step * 16 + k);
                    const uint32_t got = hardware_read(descriptor, row, k);
                    CHECK(got == expected, "base %u step %d row %d k %d: %u, expected %u", base,
                          step, row, k, got, expected);
                }
            }
        }
    }
}

void fragments_cover_the_result() {
    for (int N : {8, 16, 32, 64}) {
        std::set<std::pair<int, int>> seen;
        for (int thread = 0; thread < 128; ++thread) {
            for (int i = 0; i < N / 2; ++i) {
                const int row = fragment_row(thread, i), column = fragment_column(thread, i);
                CHECK(row >= 0 && row < 64 && column >= 0 && column < N, "row %d column %d", row,
                      column);
                CHECK(row / 16 == thread / 32, "a warp holds its own 16 rows");
                seen.insert({row, column});
            }
        }
        CHECK(seen.size() == size_t(64 * N), "N %d: %zu elements", N, seen.size());
    }
    // Spot values of the PTX manual's figure for m64nNk16: thread 5 of warp 2.
    CHECK(fragment_row(69, 0) == 33 && fragment_column(69, 0) == 2, "first register");
    CHECK(fragment_row(69, 3) == 41 && fragment_column(69, 3) == 3, "fourth register");
    CHECK(fragment_row(69, 4) == 33 && fragment_column(69, 4) == 10, "fifth register");
}

void every_tile_has_one_cta() {
    for (int ctas : {1, 7, 264}) {
        for (int blocks : {1, 3, 4, 13, 16}) {
            const int tiles = 24;
            std::map<std::pair<int, int>, int> count;
            for (int cta = 0; cta < ctas; ++cta) {
                for (int index = cta; index < blocks * tiles; index += ctas) {
                    const Work work = work_of(index, tiles, blocks);
                    ++count[{work.block, work.tile}];
                }
            }
            CHECK(count.size() == size_t(blocks * tiles), "%zu tiles", count.size());
            for (const auto& [tile, times] : count)
                CHECK(times == 1, "block %d tile %d", tile.first, tile.second);
        }
    }
}

// Blocks of one expert in one group read its tile at neighbouring indices: one read of DRAM, then
// the cache.
void equal_tiles_of_a_group_are_adjacent() {
    const int blocks = 13, tiles = 24;
    std::map<std::pair<int, int>, std::vector<int>> indices;  // (group, tile) -> where it is read
    for (int index = 0; index < blocks * tiles; ++index) {
        const Work work = work_of(index, tiles, blocks);
        indices[{work.block / kGroupBlocks, work.tile}].push_back(index);
    }
    for (const auto& [key, read] : indices) {
        CHECK(read.back() - read.front() == int(read.size()) - 1, "group %d tile %d", key.first,
              key.second);
    }
}

// Each weight row of the active expert is read by exactly one tile, gate with its up, and none
// beyond the expert.
void weight_rows_are_read_once() {
    const int E = 3;
    for (int rows : {64, 192, 768}) {
        for (bool gate_up : {true, false}) {
            const int per_expert = gate_up ? 2 * rows : rows;
            const int tile_rows = gate_up ? kTileRows : kWeightTiles * kTileRows;
            std::vector<int> read(E * per_expert + kTileRows, 0);
            for (int tile = 0; tile < ceil_div(rows, tile_rows); ++tile) {
                const int first = first_weight_row(1, per_expert, tile, gate_up);
                const int second = second_weight_row(first, rows, gate_up);
                for (int j = 0; j < kTileRows; ++j) {
                    ++read[first + j];
                    // The last tile of down may be half empty; its second half is not stored.
                    const bool stored = gate_up || tile * tile_rows + kTileRows + j < rows;
                    if (stored) ++read[second + j];
                }
            }
            for (int row = 0; row < E * per_expert; ++row) {
                const bool mine = row >= per_expert && row < 2 * per_expert;
                CHECK(read[row] == mine, "rows %d gate_up %d row %d read %d times", rows, gate_up,
                      row, read[row]);
            }
        }
    }
}

// A producer and a consumer that follow the ring's parities never overwrite or read a stage too
// early.
void ring_parities() {
    for (int stages : {2, 4, 6}) {
        std::vector<int> full(stages, 0), empty(stages, 0), held(stages, -1);
        PipelineState producer, consumer;
        int produced = 0, consumed = 0;
        // A wait on parity p returns when the number of completed phases has the other parity.
        const auto done = [](int completed, uint32_t parity) { return (completed & 1u) != parity; };
        std::srand(7);
        while (consumed < 1000) {
            if (std::rand() % 2 == 0) {
                if (!done(empty[producer.index], producer.phase ^ 1)) continue;
                CHECK(held[producer.index] == -1, "stage %d overwritten", producer.index);
                held[producer.index] = produced++;
                ++full[producer.index];
                producer.advance(stages);
            } else {
                if (!done(full[consumer.index], consumer.phase)) continue;
                CHECK(held[consumer.index] == consumed, "stage %d holds %d", consumer.index,
                      held[consumer.index]);
                held[consumer.index] = -1;
                ++consumed;
                ++empty[consumer.index];
                consumer.advance(stages);
            }
            CHECK(produced - consumed <= stages, "ring holds %d", produced - consumed);
        }
    }
}

void bound_on_blocks() {
    for (int a = 0; a <= 20; ++a) {
        for (int b = 0; b <= 20; ++b) {
            for (int c = 0; c <= 20; ++c) {
                const int need = ceil_div(a, 8) + ceil_div(b, 8) + ceil_div(c, 8);
                CHECK(need <= max_blocks(a + b + c, 3, 8), "counts %d %d %d", a, b, c);
            }
        }
    }
    CHECK(max_blocks(11, 3, 8) == 4, "counts 9, 1, 1 need four blocks");
}

int main() {
    swizzle_is_the_hardwares();
    descriptors_read_what_tma_wrote();
    fragments_cover_the_result();
    every_tile_has_one_cta();
    equal_tiles_of_a_group_are_adjacent();
    weight_rows_are_read_once();
    ring_parities();
    bound_on_blocks();
    std::printf("ok\n");
}
