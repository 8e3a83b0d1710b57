// What the operators of recurrent layers hand to their kernels; as plain as types.h.
#pragma once

#include "types.h"

namespace moesd {

// What a kernel's buffers hold, and the op boundary checks.
constexpr int64_t kMaxStateSize = 512;  // numbers of state a channel
constexpr int64_t kMaxTaps = 32;
constexpr int64_t kMaxNormGroup = 16384;

// Values of tokens [B, Q, ...] of which those of a token are contiguous; strides in elements.
struct TokenValues {
    const void* data;
    int64_t row, token;
};

// How rows of unequal length advance their states: sequence b takes counts[b] tokens and writes its
// state back behind the first keep[b] of them.
struct Ragged {
    int64_t batch, tokens;  // B, Q
    const int64_t* rows;    // [B] into the states
    const int64_t* keep;    // [B]
    const int64_t* counts;  // [B]
};

struct DeltaRuleArgs {
    DType dtype;
    Ragged ragged;
    int64_t key_heads, heads, key_dim, value_dim;  // Hk, Hv, Dk, Dv
    TokenValues query;                             // [B, Q, Hk, Dk]
    TokenValues key;                               // [B, Q, Hk, Dk]
    TokenValues value;                             // [B, Q, Hv, Dv]
    const float* decay;                            // [B, Q, Hv], per channel [B, Q, Hv, Dk]
    bool decay_per_channel;
    const float* beta;  // [B, Q, Hv]
    float* states;      // [R, Hv, Dk, Dv]
    void* out;          // [B, Q, Hv, Dv]
    int threads;
    RunTeam run;
};

struct StateSpaceArgs {
    DType dtype;
    Ragged ragged;
    // Hh, P, G, N; Mamba-1 is one head of all channels, with a dt and a row of A for each.
    int64_t heads, head_dim, groups, state_size;
    TokenValues x;     // [B, Q, Hh, P]
    const float* dt;   // [B, Q, Hh], Mamba-1: [B, Q, P]
    const float* a;    // [Hh], Mamba-1: [P, N]
    TokenValues b, c;  // [B, Q, G, N]
    const float* d;    // [Hh], Mamba-1: [P]
    float* states;     // [R, Hh, P, N]
    void* out;         // [B, Q, Hh, P]
    int threads;
    RunTeam run;
};

struct ConvolutionArgs {
    DType dtype;
    int64_t batch, tokens, channels, taps;
    TokenValues window;  // [B, taps - 1 + Q, C]
    const void* weight;  // [C, taps]
    const void* bias;    // [C] or null
    bool has_activation;
    Activation activation;
    void* out;  // [B, Q, C]
    int threads;
    RunTeam run;
};

struct GatedNormArgs {
    DType dtype;
    int64_t rows, groups, width;
    const void* x;     // [rows, groups * width], rows x_row elements apart
    const void* gate;  // likewise
    int64_t x_row, gate_row;
    const void* w;    // [groups * width], or [width] for every group
    bool w_of_group;  // the latter
    float eps;
    bool gate_first;  // the gate is applied before the norm, not after it
    bool cast_first;  // the norm, and its product with w before a gate, are rounded to the dtype
    bool sigmoid;     // what is applied of the gate, instead of its SiLU
    void* out;        // [rows, groups * width]
    int threads;
    RunTeam run;
};

}  // namespace moesd
