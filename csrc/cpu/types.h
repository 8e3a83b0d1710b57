// Plain types shared by the op boundary (which sees torch) and the kernels (which must not: code
// compiled with wider instruction sets may not share inline functions with the rest of the
// program).
#pragma once

#include <cstdint>

namespace moesd {

struct bf16 {
    uint16_t bits;
};
struct half {
    uint16_t bits;
};

enum class DType { kFloat32, kBFloat16, kFloat16 };
enum class Activation { kSilu, kGelu, kGeluTanh, kRelu, kRelu2 };
// How weights are stored; moesd_kernels/formats says what each of them means.
enum class WeightFormat {
    kPlain,
    kFp8Block,
    kMxfp4,
    kInt8,
    kInt4,
    kQ8_0,
    kQ4_0,
    kQ4_1,
    kQ5_0,
    kQ5_1,
    kQ4_K,
    kQ5_K,
    kQ6_K,
};

// Every packed activation row is padded with zeros to a multiple of this, the longest K step of any
// instruction set.
constexpr int64_t kDepthAlign = 32;
// To an odd multiple: rows a power of two apart would compete for the same few lines of the
// first-level cache.
static constexpr int64_t align_depth(int64_t k) {
    return ((k + kDepthAlign - 1) / kDepthAlign | 1) * kDepthAlign;
}

// What the kernels' buffers hold, and the op boundary checks.
constexpr int64_t kMaxHeadDim = 576;
constexpr int64_t kMaxExperts = 1024;

// A matrix of weights [R, C] as it is stored, or several of them, one after another.
struct StoredWeights {
    WeightFormat format;
    const void* data;    // rows of row_bytes each
    const void* scales;  // null where the format has none beside the data
    int64_t row_bytes;
    int64_t scale_row_bytes;  // of `rows_per_scale` weight rows
    int64_t rows_per_scale;
    int64_t group;  // adjacent weights of a row that share a scale
};

// Whether rows of a matrix are integers of eight bits with one scale each, and few enough of them
// that sums of products of bytes fit into 32 bits.
static constexpr bool rows_have_scales(const StoredWeights& w, int64_t depth) {
    constexpr int64_t kMostDepth = 65536;
    return w.format == WeightFormat::kInt8 && w.scale_row_bytes == sizeof(bf16) &&
           depth <= kMostDepth;
}

// Whether tiles multiply a matrix by activations of sixteen bits: its rows have one scale each, and
// are longer than the groups that may have one.
static constexpr bool takes_int16(const StoredWeights& w, int64_t depth) {
    constexpr int64_t kLargestGroup = 128;
    return rows_have_scales(w, depth) && w.group > kLargestGroup;
}

// Whether lanes of vectors may multiply a matrix by very few tokens, instead of tiles.
static constexpr bool takes_lanes(const StoredWeights& w, int64_t depth) {
    constexpr int64_t kLeastDepth = 128;
    return w.format == WeightFormat::kMxfp4 && depth >= kLeastDepth;
}

// Floats that a row of activations takes where kernels pack it: for tiles as pairs of bf16 and, as
// the case may be, as integers of sixteen bits, too; a panel's first tokens as floats find room
// beside the pairs.
static constexpr int64_t packed_floats(const StoredWeights& w, int64_t depth) {
    return align_depth(depth) * (takes_int16(w, depth) ? 3 : 2) / 2;
}

// Runs body(ctx) at least once and on up to `threads` threads at the same time; bodies take their
// work from counters.
using RunTeam = void (*)(int threads, void (*body)(void*), void* ctx);

// Told the name of each phase a kernel enters, by whichever threads enter it.
using EnterPhase = void (*)(void* ctx, const char* name);

// Rows of activations that lie together where kernels compute in tiles. An expert's rows begin a
// panel of their own, so `rows` of them need no more than this.
constexpr int64_t kPanelRows = 16;
static constexpr int64_t panel_rows(int64_t rows, int64_t experts) {
    return (rows / kPanelRows + (experts < rows ? experts : rows)) * kPanelRows;
}

// What a thread needs to hold decoded weight rows for kernels that compute in tiles: whole rows, or
// chunks of them.
constexpr int64_t kDecodedRows = 64;
// Whole blocks of all formats; two chunks of a tile stay in the first-level cache with a panel's.
constexpr int64_t kDecodedChunk = 256;
static constexpr int64_t decoded_size(int64_t depth) {
    return kDecodedRows * align_depth(depth > kDecodedChunk ? depth : kDecodedChunk);
}

struct ExpertsArgs {
    DType dtype;
    Activation activation;
    bool gated, interleaved, transposed;
    bool has_limit, has_alpha;
    float limit, alpha;
    int64_t tokens, hidden, inter, num_active;
    const void* x;                // [T, H]
    StoredWeights w_gate_up;      // [E, 2I, H] (or [E, H, 2I] when transposed)
    StoredWeights w_down;         // [E, H, I] (or [E, I, H])
    const void* gate_up_bias;     // [E, 2I] or null
    const void* down_bias;        // [E, H] or null
    const int64_t* active;        // [num_active] expert ids, ascending
    const int64_t* offsets;       // [num_active + 1] into the sorted rows
    const int64_t* sorted_token;  // [N]
    const float* sorted_weight;   // [N]
    // Scratch: [T, align_depth(H)] and [N, align_depth(I)]; for panels both have panel_rows(N, E).
    float* packed_x;
    float* packed_act;
    float* acc;              // [T * H] scratch, by slices of the output
    bf16* decoded;           // scratch for tiles: decoded_size of the longer depth for each thread
    void* out;               // [T, H]
    EnterPhase enter_phase;  // null unless a profiler listens
    void* phase_ctx;
    int threads;
    RunTeam run;
};

struct LinearArgs {
    DType dtype;
    int64_t tokens, depth, features;
    const void* x;     // [T, K]
    StoredWeights w;   // [N, K]
    const void* bias;  // [N] or null
    // Scratch: [T, align_depth(K)]; for panels [panel_rows(T, 1), align_depth(K)].
    float* packed_x;
    bf16* decoded;  // scratch for tiles: decoded_size(K) for each thread
    void* out;      // [T, N]
    int threads;
    RunTeam run;
};

struct AttentionArgs {
    DType dtype;
    int64_t batch, queries, q_heads, kv_heads, head_dim, value_dim;
    const void* q;  // [B, Q, Hq, D], element strides below
    int64_t q_batch, q_query, q_head;
    const void* k;  // [rows, S, Hkv, D]
    int64_t k_row, k_position, k_head;
    const void* v;  // [rows, S, Hkv, Dv]
    int64_t v_row, v_position, v_head;
    const int64_t* positions;  // [B, Q]
    const int64_t* rows;       // [B] or null for the identity
    const float* sinks;        // [Hq] or null
    float scale;
    int64_t window;
    void* out;  // [B, Q, Hq, Dv] contiguous
    int threads;
    RunTeam run;
};

// out = (offset + w) * (x / rms(x)), computed in fp32; the norm in parentheses on the right is
// rounded to the dtype of x before the product where `cast_first`.
struct NormRule {
    float eps;
    float offset = 0.0f;
    bool cast_first = true;
};

struct NormArgs {
    DType dtype;
    int64_t rows, width;
    const void* x;
    const void* w;
    NormRule rule;
    const void* delta;  // added to x before the norm, or null
    void* sum;          // x + delta
    void* out;
    int threads;
    RunTeam run;
};

struct RopeArgs {
    DType dtype;
    int64_t tokens, q_heads, kv_heads, head_dim;
    const void* qkv;     // [T, (Hq + 2 Hkv) * D]
    const void* cos;     // [T, D]
    const void* sin;     // [T, D]
    const void* q_norm;  // [D] or null
    const void* k_norm;  // [D] or null
    float q_eps, k_eps;
    const int64_t* index;  // [T] rows of the cache
    void* keys;            // [rows, Hkv * D]
    void* values;          // [rows, Hkv * D]
    void* q;               // [T, Hq, D]
    int threads;
    RunTeam run;
};

struct ActArgs {
    DType dtype;
    Activation activation;
    int64_t elements;
    const void* gate;
    const void* up;
    void* out;
    int threads;
    RunTeam run;
};

struct RouterArgs {
    DType dtype;
    int64_t tokens, experts, top_k;
    bool renormalize;
    const void* logits;  // [T, E]
    float* weights;      // [T, K]
    int64_t* ids;        // [T, K]
    int threads;
    RunTeam run;
};

struct ArgmaxArgs {
    DType dtype;
    int64_t rows, width;
    const void* x;    // [rows, width]
    int64_t* ids;     // [rows]
    bool* undefined;  // [rows] the largest is NaN or -inf
    int threads;
    RunTeam run;
};

struct RaceArgs {
    int64_t rows, width;
    const float* probs;   // [rows, width]
    const int64_t* keys;  // [rows]
    int64_t* ids;         // [rows]
    int threads;
    RunTeam run;
};

// Of recurrent layers: recurrent.h.
struct DeltaRuleArgs;
struct StateSpaceArgs;
struct ConvolutionArgs;
struct GatedNormArgs;

struct KernelTable {
    const char* name;
    bool panels;  // whether activations are packed in panels
    void (*experts)(const ExpertsArgs&);
    void (*linear)(const LinearArgs&);
    // The same with activations of eight bits.
    void (*experts_int8)(const ExpertsArgs&);
    void (*linear_int8)(const LinearArgs&);
    void (*attention)(const AttentionArgs&);
    void (*rms_norm)(const NormArgs&);
    void (*rope_to_cache)(const RopeArgs&);
    void (*act_and_mul)(const ActArgs&);
    void (*router)(const RouterArgs&);
    void (*argmax)(const ArgmaxArgs&);
    void (*race)(const RaceArgs&);
    void (*delta_rule)(const DeltaRuleArgs&);
    void (*mamba2)(const StateSpaceArgs&);
    void (*mamba)(const StateSpaceArgs&);
    void (*convolution)(const ConvolutionArgs&);
    void (*gated_norm)(const GatedNormArgs&);
};

}  // namespace moesd
