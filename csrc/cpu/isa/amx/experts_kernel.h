// The experts layer in bf16 on AMX tiles, in the two passes of ExpertsKernel. Each expert's tokens
// are packed in panels of sixteen. The sums of gate and up have a token in each column, which is
// how the panels of the down projection hold them: nothing is transposed between the two passes.
#pragma once

#include "weights.h"
#include "../../kernels/experts_kernel.h"

namespace moesd::MOESD_ISA {

class AmxExpertsKernel {
    static constexpr int64_t kRows = 2 * kTile;  // intermediate rows of an item

public:
    explicit AmxExpertsKernel(const ExpertsArgs& a)
        : a_(a),
          x_extra_(panel_extra(a.w_gate_up, a.hidden)),
          act_extra_(panel_extra(a.w_down, a.inter)),
          x_size_(x_extra_ + steps_of(a.hidden) * kStepSize),
          act_size_(act_extra_ + steps_of(a.inter) * kStepSize),
          up_rows_(a.gated ? 2 * a.inter : a.inter),
          blocks_((a.inter + kRows - 1) / kRows),
          slice_(output_slice(a)),
          all_gate_up_(a.w_gate_up, a.hidden),
          all_down_(a.w_down, a.inter),
          pack_(a.num_active, a.threads),
          threads_(a.threads),
          up_(a.num_active * blocks_),
          take_(act_extra_ > 0 ? a.num_active : 0, a.threads),
          down_((a.hidden + slice_ - 1) / slice_) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<AmxExpertsKernel*>(self)->work(); }, this);
    }

private:
    void work() {
        const Tiles tiles;
        pack_.share([this](int64_t e) { pack(e); });
        pack_.wait();
        bf16* decoded = a_.decoded +
                        threads_.take() * decoded_size(a_.hidden > a_.inter ? a_.hidden : a_.inter);
        if (a_.enter_phase) a_.enter_phase(a_.phase_ctx, "moesd::gate_up");
        int64_t done = 0, slice = -1;
        for (int64_t i = up_.take(); i < up_.total; ++done) {
            const int64_t next_item = up_.take();
            if (next_item >= up_.total) slice = down_.take();
            const int64_t loads =
                tile_loads(panels_of(i / blocks_), (a_.gated ? 2 : 1) * kRows, a_.hidden);
            PrefetchStreams prefetch =
                next_item < up_.total ? fetch_gate_up(next_item, loads) : fetch_down(slice, loads);
            if (a_.gated) gate_up<2>(i, prefetch, decoded);
            else gate_up<1>(i, prefetch, decoded);
            i = next_item;
        }
        up_.finish(done), up_.wait();
        take_.share([this](int64_t e) { take_act(e); });
        take_.wait();
        if (a_.enter_phase) a_.enter_phase(a_.phase_ctx, "moesd::down_combine");
        if (slice < 0) slice = down_.take();
        while (slice < down_.total) {
            const int64_t next_item = down_.take();
            down(slice, next_item, decoded);
            slice = next_item;
        }
    }

    int64_t tokens_of(int64_t e) const { return a_.offsets[e + 1] - a_.offsets[e]; }
    int64_t panels_of(int64_t e) const { return (tokens_of(e) + kTile - 1) / kTile; }
    // The number of expert e's first panel: an upper bound on the panels of the experts before it.
    int64_t first_panel(int64_t e) const { return a_.offsets[e] / kTile + e; }
    bf16* x_panels(int64_t e) const {
        return reinterpret_cast<bf16*>(a_.packed_x) + first_panel(e) * x_size_;
    }
    bf16* act_panels(int64_t e) const {
        return reinterpret_cast<bf16*>(a_.packed_act) + first_panel(e) * act_size_;
    }

    Matrix<bf16> gate_up_of(int64_t e) const { return all_gate_up_.nth(a_.active[e], up_rows_); }
    Matrix<bf16> down_of(int64_t e) const { return all_down_.nth(a_.active[e], a_.hidden); }

    void pack(int64_t e) const {
        const bf16* rows[kTile];
        for (int64_t p = 0; p < panels_of(e); ++p) {
            const int64_t first = a_.offsets[e] + p * kTile, left = a_.offsets[e + 1] - first;
            const int count = static_cast<int>(left < kTile ? left : kTile);
            for (int m = 0; m < count; ++m) {
                rows[m] = static_cast<const bf16*>(a_.x) + a_.sorted_token[first + m] * a_.hidden;
            }
            bf16* const panel = x_panels(e) + p * x_size_;
            pack_panel(rows, count, a_.hidden, panel + x_extra_);
            fill_extra(a_.w_gate_up, panel, a_.hidden, tokens_of(e));
        }
    }

    // Of an expert's intermediate numbers, when all of them are there.
    void take_act(int64_t e) const {
        for (int64_t p = 0; p < panels_of(e); ++p) {
            fill_extra(a_.w_down, act_panels(e) + p * act_size_, a_.inter, tokens_of(e));
        }
    }

    // Row j of the gate (part 0) or up projection (part 1) in an expert's matrix.
    int64_t up_row(int64_t part, int64_t j) const {
        return a_.interleaved ? 2 * j + part : part * a_.inter + j;
    }

    // Prefetches the weights of a gate/up item; all have as many rows as a full one, though an
    // expert's last item may have fewer.
    PrefetchStreams fetch_gate_up(int64_t item, int64_t loads) const {
        const int64_t first = up_row(0, item % blocks_ * kRows);
        const int64_t count = a_.gated ? kRows : kRows / 2;
        const bool apart = a_.gated && !a_.interleaved;
        return prefetch_rows(gate_up_of(item / blocks_), first, first + (apart ? a_.inter : count),
                             count, loads);
    }

    // Prefetches the first weights of a slice of the output.
    PrefetchStreams fetch_down(int64_t slice, int64_t loads) const {
        if (slice >= down_.total) return {};
        return fetch_rows(down_of(0), slice * slice_, slice_ < 4 * kTile ? slice_ : 4 * kTile,
                          loads);
    }
    static PrefetchStreams fetch_rows(const Matrix<bf16>& matrix, int64_t first, int64_t rows,
                                      int64_t loads) {
        return prefetch_rows(matrix, first, first + rows / 2, rows / 2, loads);
    }

    // One item: kRows intermediate rows for all of an expert's tokens. Parts: 2 for gate and up, 1
    // for experts that are not gated.
    template <int Parts>
    void gate_up(int64_t item, PrefetchStreams& prefetch, bf16* decoded) const {
        const int64_t e = item / blocks_, j = item % blocks_ * kRows, count = panels_of(e);
        const bf16* x = x_panels(e);
        alignas(64) float sums[4 * kTileSums];
        const Matrix<bf16> matrix = gate_up_of(e);
        const auto tile = [&](int i) -> TileOfRows {
            const int64_t row = j + i / Parts * kTile;
            return {{matrix, up_row(i % Parts, row), a_.interleaved ? 2 : 1}, a_.inter - row};
        };
        const Block<2 * Parts> block(tile, tokens_of(e), decoded);
        int64_t p = 0;
        for (; p + 2 <= count; p += 2) {
            const bf16* const pair[2] = {x + p * x_size_, x + (p + 1) * x_size_};
            for_tiles<2>([&]<int Half>() {
                block.template multiply<Half * Parts, Parts>(pair, prefetch, sums);
                for (int t = 0; t < 2; ++t) {
                    activate_tile(e, j + Half * kTile, p + t, sums + t * kTileSums,
                                  sums + (Parts * 2 - 2 + t) * kTileSums);
                }
            });
        }
        if (p == count) return;
        block.template multiply<0, 2 * Parts>({x + p * x_size_}, prefetch, sums);
        for (int half = 0; half < 2; ++half) {
            const float* gate = sums + half * Parts * kTileSums;
            activate_tile(e, j + half * kTile, p, gate, gate + (Parts - 1) * kTileSums);
        }
    }

    // Activates sums of intermediate rows j .. j + kTile and panel p, and packs them: they are part
    // of the depth of the down projection.
    void activate_tile(int64_t e, int64_t j, int64_t p, const float* gate, const float* up) const {
        bf16* panel = act_panels(e) + p * act_size_ + act_extra_ + j * kTile;
        for (int64_t n = 0; n < kTile; n += 2, panel += 2 * kTile) {
            const Vec even = activated(e, j + n, gate + n * kTile, up + n * kTile);
            const Vec odd = activated(e, j + n + 1, gate + (n + 1) * kTile, up + (n + 1) * kTile);
            _mm512_store_si512(panel, rounded_pairs(even, odd));
        }
    }

    Vec activated(int64_t e, int64_t row, const float* gate, const float* up) const {
        if (row >= a_.inter) return splat(0.0f);
        Vec g = load(gate), u = load(up);
        if (a_.gate_up_bias) {
            const bf16* bias = static_cast<const bf16*>(a_.gate_up_bias) + a_.active[e] * up_rows_;
            g = add(g, splat(widened(bias[a_.interleaved ? 2 * row : row])));
            if (a_.gated) {
                u = add(u, splat(widened(bias[a_.interleaved ? 2 * row + 1 : a_.inter + row])));
            }
        }
        return gated_activation(a_, g, u);
    }

    void down(int64_t slice, int64_t next_item, bf16* decoded) const {
        const int64_t h0 = slice * slice_, h1 = h0 + slice_ < a_.hidden ? h0 + slice_ : a_.hidden;
        const OutputSlice out(a_, h0, h1);
        for (int64_t e = 0; e < a_.num_active; ++e) {
            const Matrix<bf16> matrix = down_of(e);
            for (int64_t h = h0; h < h1; h += 4 * kTile) {
                const int64_t rows = h1 - h < 4 * kTile ? h1 - h : 4 * kTile;
                const int64_t loads = tile_loads(panels_of(e), rows, a_.inter);
                const bool more = h + 4 * kTile < h1;
                PrefetchStreams prefetch = more ? fetch_rows(matrix, h + 4 * kTile, rows, loads)
                                           : e + 1 < a_.num_active
                                               ? fetch_rows(down_of(e + 1), h0, rows, loads)
                                               : fetch_down(next_item, loads);
                panels_product(matrix, h, rows, act_panels(e), act_size_, tokens_of(e), prefetch,
                               decoded,
                               [&](int64_t w, int64_t p, const float* first, const float* second) {
                                   combine(e, h + w * kTile, h1, p, first, out);
                                   combine(e, h + (w + 1) * kTile, h1, p, second, out);
                               });
            }
        }
        out.store<bf16>();
    }

    // Adds sums of outputs h .. h + kTile and panel p, weighted, to those of the experts before e.
    void combine(int64_t e, int64_t h, int64_t h1, int64_t p, const float* sums,
                 const OutputSlice& out) const {
        const int64_t width = h1 - h < kTile ? h1 - h : kTile;
        if (width <= 0) return;
        Vec by_token[kTile];
        sums_by_token(sums, by_token);
        alignas(64) float bias[kTile] = {};
        if (a_.down_bias) {
            load_row(bias, static_cast<const bf16*>(a_.down_bias) + a_.active[e] * a_.hidden + h,
                     width);
        }
        const __mmask16 valid = static_cast<__mmask16>((1u << width) - 1);
        for (int64_t m = 0; m < kTile && p * kTile + m < tokens_of(e); ++m) {
            const int64_t n = a_.offsets[e] + p * kTile + m;
            float* acc = out.sums(a_.sorted_token[n], h);
            const Vec term = mul(splat(a_.sorted_weight[n]), add(by_token[m], load(bias)));
            _mm512_mask_storeu_ps(acc, valid, add(_mm512_maskz_loadu_ps(valid, acc), term));
        }
    }

    const ExpertsArgs& a_;
    const int64_t x_extra_, act_extra_, x_size_, act_size_, up_rows_, blocks_, slice_;
    const Matrix<bf16> all_gate_up_, all_down_;
    Rows pack_;
    Counter threads_, up_;
    Rows take_;
    Counter down_;
};

}  // namespace moesd::MOESD_ISA
