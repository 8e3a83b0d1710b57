// The experts layer with activations rounded to eight bits and weights that are stored as integers,
// in the two passes of ExpertsKernel. An item of the first is a run of an expert's intermediate
// rows, which then are a run of the depth of the down projection.
#pragma once

#include "../experts_kernel.h"
#include "tile_sums.h"

namespace moesd::MOESD_ISA {

// W: of the layer's input and output. Product: how integers are multiplied.
template <class W, class Product>
class ExpertsInt8Kernel {
    static constexpr int kHalves = kRun / kTileRows;  // tiles of an item's gate, and of its up rows

public:
    explicit ExpertsInt8Kernel(const ExpertsArgs& a)
        : a_(a),
          parts_(a.gated ? 2 : 1),
          slice_(output_slice(a)),
          up_reader_(code_reader_of<Product>(a.w_gate_up.format)),
          down_reader_(code_reader_of<Product>(a.w_down.format)),
          all_gate_up_(a.w_gate_up, a.hidden),
          all_down_(a.w_down, a.inter),
          pack_(a.num_active * (a.hidden / kRun), a.threads),
          up_(a.num_active * (a.inter / kRun)),
          down_((a.hidden + slice_ - 1) / slice_) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<ExpertsInt8Kernel*>(self)->work(); }, this);
    }

private:
    void work() {
        const typename Product::Thread thread(kPanelRows);
        pack_.share([this](int64_t item) { pack(item); });
        pack_.wait();
        if (a_.enter_phase) a_.enter_phase(a_.phase_ctx, "moesd::gate_up");
        int64_t done = 0;
        for (int64_t i = up_.take(); i < up_.total; ++done) {
            const int64_t next = up_.take();
            gate_up(i, next);
            i = next;
        }
        up_.finish(done), up_.wait();
        if (a_.enter_phase) a_.enter_phase(a_.phase_ctx, "moesd::down_combine");
        for (int64_t i = down_.take(); i < down_.total;) {
            const int64_t next = down_.take();
            down(i, next);
            i = next;
        }
    }

    // Each expert's rows begin a panel of their own.
    Panels panels(float* memory, int64_t depth, int64_t e) const {
        const int64_t first = a_.offsets[e] / kPanelRows + e;
        return {reinterpret_cast<uint8_t*>(memory) + first * Panel::bytes_of(depth), depth,
                a_.offsets[e + 1] - a_.offsets[e]};
    }
    Panels x_panels(int64_t e) const { return panels(a_.packed_x, a_.hidden, e); }
    Panels act_panels(int64_t e) const { return panels(a_.packed_act, a_.inter, e); }
    Matrix<float> gate_up_of(int64_t e) const {
        return all_gate_up_.nth(a_.active[e], parts_ * a_.inter);
    }
    Matrix<float> down_of(int64_t e) const { return all_down_.nth(a_.active[e], a_.hidden); }

    // An item is a run of an expert's tokens.
    void pack(int64_t item) const {
        const int64_t e = item / (a_.hidden / kRun), run = item % (a_.hidden / kRun);
        const Panels x = x_panels(e);
        for (int64_t p = 0; p < x.count(); ++p) {
            const W* rows[kPanelRows];
            for (int m = 0; m < x.rows_of(p); ++m) {
                const int64_t t = a_.sorted_token[a_.offsets[e] + p * kPanelRows + m];
                rows[m] = static_cast<const W*>(a_.x) + t * a_.hidden;
            }
            pack_run(rows, x.rows_of(p), run, up_reader_.order, x[p]);
        }
    }

    // Of row j of the gate (part 0) or up projection (part 1): its place in an expert's matrix.
    int64_t up_row(int64_t part, int64_t j) const {
        return a_.interleaved ? 2 * j + part : part * a_.inter + j;
    }
    // The tile that is read after one of an item: the item's next, or the first of the next item.
    WeightsAhead after_up(int64_t item, int64_t next, int64_t tile) const {
        const bool last = tile + 1 == parts_ * kHalves;
        if (last && next >= up_.total) return {};
        const int64_t of = last ? next : item, place = last ? 0 : tile + 1;
        const int64_t runs = a_.inter / kRun, j = of % runs * kRun + place % kHalves * kTileRows;
        return {gate_up_of(of / runs).stored, up_row(place / kHalves, j),
                kTileRows * (a_.interleaved ? 2 : 1), kFetches * (a_.hidden / kRun)};
    }

    void gate_up(int64_t item, int64_t next) const {
        const int64_t e = item / (a_.inter / kRun), run = item % (a_.inter / kRun);
        const Panels x = x_panels(e), act = act_panels(e);
        const Matrix<float> matrix = gate_up_of(e);
        alignas(64) float sums[2 * kHalves][kTilePanels][kTileSize];
        for (int64_t first = 0; first < x.count(); first += kTilePanels) {
            const int64_t count = x.count_from(first);
            for (int64_t tile = 0; tile < parts_ * kHalves; ++tile) {
                const int64_t j = run * kRun + tile % kHalves * kTileRows;
                const RowsOfTile rows(matrix, up_row(tile / kHalves, j), a_.interleaved ? 2 : 1,
                                      kTileRows);
                WeightsAhead ahead = after_up(item, next, tile);
                tile_sums<Product>(up_reader_, rows, x, first, count, ahead, sums[tile]);
            }
            for (int64_t i = 0; i < count; ++i) {
                for (int m = 0; m < x.rows_of(first + i); ++m) {
                    alignas(64) float numbers[kRun];
                    for (int half = 0; half < kHalves; ++half) {
                        const float* gate = sums[half][i] + m * kTileRows;
                        const float* up = sums[half + (parts_ - 1) * kHalves][i] + m * kTileRows;
                        activate(e, run * kRun + half * kTileRows, gate, up,
                                 numbers + half * kTileRows);
                    }
                    pack_numbers(numbers, run, m, down_reader_.order, act[first + i]);
                }
                clear_rows(run, x.rows_of(first + i), act[first + i]);
            }
        }
    }

    // kTileRows intermediate numbers of a token, from row j on.
    void activate(int64_t e, int64_t j, const float* gate, const float* up, float* out) const {
        alignas(64) float biases[2][kTileRows] = {};
        if (a_.gate_up_bias) {
            const W* bias =
                static_cast<const W*>(a_.gate_up_bias) + a_.active[e] * parts_ * a_.inter;
            for (int part = 0; part < parts_; ++part) {
                for (int r = 0; r < kTileRows; ++r) {
                    biases[part][r] = widened(bias[up_row(part, j + r)]);
                }
            }
        }
        for (int r = 0; r < kTileRows; r += kLanes) {
            store(out + r, gated_activation(a_, add(load(gate + r), load(biases[0] + r)),
                                            add(load(up + r), load(biases[1] + r))));
        }
    }

    // The tile of a slice that is read after row h of expert e's: its next rows, the next expert's,
    // or those of the next slice.
    WeightsAhead after_down(int64_t e, int64_t h, int64_t h0, int64_t h1, int64_t next) const {
        if (h + kTileRows < h1) h += kTileRows;
        else if (e + 1 < a_.num_active) ++e, h = h0;
        else if (next < down_.total) e = 0, h = next * slice_;
        else return {};
        return {down_of(e).stored, h, kTileRows, kFetches * (a_.inter / kRun)};
    }

    void down(int64_t slice, int64_t next) const {
        const int64_t h0 = slice * slice_, h1 = h0 + slice_ < a_.hidden ? h0 + slice_ : a_.hidden;
        const OutputSlice out(a_, h0, h1);
        alignas(64) float sums[kTilePanels][kTileSize];
        for (int64_t e = 0; e < a_.num_active; ++e) {
            const Panels act = act_panels(e);
            const Matrix<float> matrix = down_of(e);
            for (int64_t h = h0; h < h1; h += kTileRows) {
                const RowsOfTile rows(matrix, h, 1, h1 - h);
                WeightsAhead ahead = after_down(e, h, h0, h1, next);
                for (int64_t first = 0; first < act.count(); first += kTilePanels) {
                    const int64_t count = act.count_from(first);
                    tile_sums<Product>(down_reader_, rows, act, first, count, ahead, sums);
                    for (int64_t i = 0; i < count; ++i) {
                        combine(e, h, rows.width, first + i, act.rows_of(first + i), sums[i], out);
                    }
                }
            }
        }
        out.template store<W>();
    }

    // Adds a panel's sums of outputs h .. h + width, weighted, to those of the experts before e.
    void combine(int64_t e, int64_t h, int64_t width, int64_t p, int rows, const float* sums,
                 const OutputSlice& out) const {
        alignas(64) float bias[kTileRows] = {};
        if (a_.down_bias) {
            load_row(bias, static_cast<const W*>(a_.down_bias) + a_.active[e] * a_.hidden + h,
                     width);
        }
        for (int m = 0; m < rows; ++m) {
            const int64_t n = a_.offsets[e] + p * kPanelRows + m;
            float* acc = out.sums(a_.sorted_token[n], h);
            for (int64_t r = 0; r < width; ++r) {
                acc[r] += a_.sorted_weight[n] * (sums[m * kTileRows + r] + bias[r]);
            }
        }
    }

    const ExpertsArgs& a_;
    const int64_t parts_, slice_;
    const CodeReader up_reader_, down_reader_;
    const Matrix<float> all_gate_up_, all_down_;
    Rows pack_;
    Counter up_, down_;
};

}  // namespace moesd::MOESD_ISA
