"""What shapes the C++ operators return, for ``torch.compile``, which does not run them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


@functools.cache  # once per process: some versions of torch refuse a second time
def register_fakes() -> None:
    """Tell ``torch.compile``; the operators must be loaded."""
    fake = torch.library.register_fake

    @fake("moesd::experts")
    def _(hidden, w_gate_up, w_down, topk_ids, topk_weights, *rest):
        return None

    @fake("moesd::linear")
    def _(x, w, bias, scale=None, weight_format="plain", int8_activations=False):
        return x.new_empty(x.shape[0], w.shape[0])

    @fake("moesd::ragged_attention")
    def _(q, k, v, positions, scale, window, sinks, rows):
        return q.new_empty(*q.shape[:3], v.shape[3])

    @fake("moesd::rms_norm")
    def _(x, w, eps, offset=0.0, cast_first=True):
        return x.new_empty(x.shape)

    @fake("moesd::add_rms_norm")
    def _(x, delta, w, eps):
        return x.new_empty(x.shape), x.new_empty(x.shape)

    @fake("moesd::rope_to_cache")
    def _(qkv, cos, sin, q_norm, q_eps, k_norm, k_eps, index, q_heads, kv_heads, keys, values):
        return qkv.new_empty(qkv.shape[0], q_heads, cos.shape[1])

    @fake("moesd::act_and_mul")
    def _(gate, up, activation):
        return gate.new_empty(gate.shape)

    @fake("moesd::softmax_topk_router")
    def _(x, w, top_k, renormalize):
        logits = x.new_empty(x.shape[0], w.shape[0])
        weights = x.new_empty(x.shape[0], top_k, dtype=torch.float32)
        return logits, weights, x.new_empty(x.shape[0], top_k, dtype=torch.int64)

    @fake("moesd::argmax")
    def _(x):
        ids = x.new_empty(x.shape[:-1], dtype=torch.int64)
        return ids, x.new_empty(x.shape[:-1], dtype=torch.bool)

    @fake("moesd::race")
    def _(probs, keys):
        return probs.new_empty(probs.shape[:-1], dtype=torch.int64)

    _register_recurrent(fake)


def _register_recurrent(fake: Callable[[str], Any]) -> None:
    """Those of recurrent layers."""

    @fake("moesd::gated_delta_rule")
    def _(query, key, value, decay, beta, states, rows, keep, counts):
        return value.new_empty(value.shape)

    @fake("moesd::selective_state_update")
    @fake("moesd::selective_scan")
    def _(x, dt, A, B, C, D, states, rows, keep, counts):
        return x.new_empty(x.shape)

    @fake("moesd::short_convolution")
    def _(window, weight, bias=None, activation=None):
        tokens = window.shape[1] - weight.shape[1] + 1
        return window.new_empty(window.shape[0], tokens, window.shape[2])

    @fake("moesd::gated_rms_norm")
    def _(x, gate, w, eps, group, gate_first, cast_first, activation):
        return x.new_empty(x.shape)
