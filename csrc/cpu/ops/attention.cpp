// moesd::ragged_attention: checks, among them that every position and row lies inside the cache.
#include <torch/library.h>

#include "ops.h"

namespace moesd {
namespace {

using at::Tensor;

void check_cache(const Tensor& q, const Tensor& cache, const char* name) {
    TORCH_CHECK_VALUE(cache.dim() == 4 && cache.stride(3) == 1, name,
                      " must be [rows, S, Hkv, D] with a contiguous last dimension, got ",
                      cache.sizes(), " strides ", cache.strides());
    TORCH_CHECK_TYPE(cache.scalar_type() == q.scalar_type(), name, " must be ", q.scalar_type(),
                     " like q, got ", cache.scalar_type());
    TORCH_CHECK_VALUE(cache.size(3) <= kMaxHeadDim, name, " must have a head dimension up to ",
                      kMaxHeadDim, ", got ", cache.size(3));
}

// Positions may be negative, which is padding; rows may not.
void check_indices(const Tensor& index, const char* name, int64_t bound, bool allow_negative) {
    TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, name, " must be int64, got ",
                     index.scalar_type());
    const int64_t* values = index.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < index.numel(); ++i) {
        TORCH_CHECK_INDEX(values[i] < bound, name, " must be below ", bound, ", got ", values[i]);
        TORCH_CHECK_INDEX(allow_negative || values[i] >= 0, name, " must not be negative, got ",
                          values[i]);
    }
}

// The sizes and strides of q and of the caches, which have to agree.
AttentionArgs checked_shapes(const Tensor& q, const Tensor& k, const Tensor& v) {
    check_cache(q, k, "k_cache"), check_cache(q, v, "v_cache");
    AttentionArgs args{};
    args.batch = q.size(0), args.queries = q.size(1);
    args.q_heads = q.size(2), args.kv_heads = k.size(2);
    args.head_dim = q.size(3), args.value_dim = v.size(3);
    TORCH_CHECK_VALUE(k.size(3) == args.head_dim && v.size(0) == k.size(0) &&
                          v.size(1) == k.size(1) && v.size(2) == args.kv_heads,
                      "k_cache [rows, S, Hkv, D] and v_cache [rows, S, Hkv, Dv] must agree with q "
                      "[B, Q, Hq, D], got ",
                      k.sizes(), ", ", v.sizes(), " and ", q.sizes());
    TORCH_CHECK_VALUE(args.kv_heads > 0 && args.q_heads % args.kv_heads == 0,
                      "query heads must be a multiple of the key heads ", args.kv_heads, ", got ",
                      args.q_heads);
    args.q = q.const_data_ptr(), args.k = k.const_data_ptr(), args.v = v.const_data_ptr();
    args.q_batch = q.stride(0), args.q_query = q.stride(1), args.q_head = q.stride(2);
    args.k_row = k.stride(0), args.k_position = k.stride(1), args.k_head = k.stride(2);
    args.v_row = v.stride(0), args.v_position = v.stride(1), args.v_head = v.stride(2);
    return args;
}

void check_rows(const AttentionArgs& args, const OptTensor& rows, int64_t cache_rows) {
    if (!rows) {
        TORCH_CHECK_VALUE(cache_rows >= args.batch, "k_cache must have at least ", args.batch,
                          " rows, got ", cache_rows);
        return;
    }
    TORCH_CHECK_VALUE(rows->dim() == 1 && rows->size(0) == args.batch, "rows must be [", args.batch,
                      "], got ", rows->sizes());
    check_indices(*rows, "rows", cache_rows, false);
}

}  // namespace

Tensor ragged_attention(const Tensor& query, const Tensor& k, const Tensor& v,
                        const Tensor& positions, double scale, int64_t window,
                        const OptTensor& sinks, const OptTensor& rows) {
    TORCH_CHECK_VALUE(query.dim() == 4, "q must be [B, Q, Hq, D], got ", query.sizes());
    const Tensor q = query.stride(3) == 1 ? query : query.contiguous();
    AttentionArgs args = checked_shapes(q, k, v);
    TORCH_CHECK_VALUE(positions.dim() == 2 && positions.size(0) == args.batch &&
                          positions.size(1) == args.queries,
                      "positions must be [", args.batch, ", ", args.queries, "], got ",
                      positions.sizes());
    const Tensor query_positions = positions.contiguous();
    check_indices(query_positions, "positions", k.size(1), true);
    const OptTensor query_rows = rows ? OptTensor(rows->contiguous()) : std::nullopt;
    check_rows(args, query_rows, k.size(0));
    const Tensor sink_logits = sinks ? sinks->to(at::kFloat).contiguous() : Tensor();
    TORCH_CHECK_VALUE(!sinks || (sink_logits.dim() == 1 && sink_logits.size(0) == args.q_heads),
                      "sinks must be [", args.q_heads, "], got ", sinks->sizes());
    Tensor out = fresh({args.batch, args.queries, args.q_heads, args.value_dim}, q.scalar_type());
    if (out.numel() == 0) return out;
    args.dtype = storage_dtype(q, "q");
    args.positions = query_positions.const_data_ptr<int64_t>();
    args.rows = rows ? query_rows->const_data_ptr<int64_t>() : nullptr;
    args.sinks = sinks ? sink_logits.const_data_ptr<float>() : nullptr;
    args.scale = static_cast<float>(scale), args.window = window;
    args.out = out.mutable_data_ptr();
    int64_t visible = 0;
    for (int64_t i = 0; i < query_positions.numel(); ++i) visible += args.positions[i] + 1;
    args.threads = team_size(visible * args.q_heads * (args.head_dim + args.value_dim));
    args.run = run_team;
    kernels().attention(args);
    return out;
}

TORCH_LIBRARY_IMPL(moesd, CPU, m) { m.impl("ragged_attention", &ragged_attention); }

}  // namespace moesd
