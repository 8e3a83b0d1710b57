"""Recurrent mixers by model family: what they hold, and what they keep of a sequence.

Each row keeps one state at its last accepted token and, of the tokens after it, what enters the
convolution and what enters the recurrence behind it (``decoder.model.recurrent``); nothing grows
with the context. Fields are named as in transformers' config classes, whose modelling files are the
source of the matrices counted.
"""

from __future__ import annotations

from collections.abc import Callable

from .fields import Fields, need
from .mixer import Mixer


def recurrent_mixer(kind: str, fields: Fields) -> Mixer:
    """The recurrent mixer of a family's layers.

    Args:
        kind: the config's ``model_type``.

    Raises:
        NotImplementedError: a family of which no recurrent layer is known here.
        ValueError: a field is missing or no positive integer.
    """
    if kind not in FAMILIES:
        raise NotImplementedError(f"recurrent layers of {kind!r}: expected one of {[*FAMILIES]}")
    return FAMILIES[kind](fields)


def _gated_delta(fields: Fields) -> Mixer:
    """Gated delta rule: Yang et al., arXiv 2412.06464; one decay and one beta per value head."""
    hidden, heads = need(fields, "hidden_size"), need(fields, "linear_num_value_heads")
    key_dim, value_dim = need(fields, "linear_key_head_dim"), need(fields, "linear_value_head_dim")
    keys, values = need(fields, "linear_num_key_heads") * key_dim, heads * value_dim
    conv, kernel = 2 * keys + values, need(fields, "linear_conv_kernel_dim")
    return Mixer(
        params=hidden * (conv + values + 2 * heads) + values * hidden + conv * kernel,
        state_width=heads * key_dim * value_dim,
        conv_width=conv * (kernel - 1),
        ring_width=conv + (conv + 2 * heads),
    )


def _kimi_delta(fields: Fields, *, low_rank_gates: bool) -> Mixer:
    """Kimi delta attention: arXiv 2510.26692; a decay per channel, an output gate."""
    hidden, heads = need(fields, "hidden_size"), need(fields, "linear_num_heads")
    head_dim, kernel = need(fields, "linear_head_dim"), need(fields, "linear_conv_kernel_dim")
    width = heads * head_dim
    gate = head_dim * (hidden + width) if low_rank_gates else hidden * width
    return Mixer(
        params=4 * hidden * width + 2 * gate + hidden * heads + 3 * width * kernel,
        state_width=heads * head_dim**2,
        conv_width=3 * width * (kernel - 1),
        ring_width=3 * width + (3 * width + width + heads),
    )


def _mamba2(fields: Fields, inner: int, heads: str, groups: str, state: str, kernel: str) -> Mixer:
    """Mamba-2: Dao and Gu, arXiv 2405.21060; a decay per head. Names are of fields."""
    hidden, head_count = need(fields, "hidden_size"), need(fields, heads)
    state_size, taps = need(fields, state), need(fields, kernel)
    conv = inner + 2 * need(fields, groups) * state_size
    return Mixer(
        params=hidden * (inner + conv + head_count) + inner * hidden + conv * taps,
        state_width=inner * state_size,
        conv_width=conv * (taps - 1),
        ring_width=conv + (conv + head_count),
    )


def _mamba1(fields: Fields, inner: int, state: str, rank: str, kernel: str) -> Mixer:
    """Mamba: Gu and Dao, arXiv 2312.00752; a decay per channel and state. Names are of fields."""
    hidden, step_rank = need(fields, "hidden_size"), need(fields, rank)
    state_size, taps = need(fields, state), need(fields, kernel)
    return Mixer(
        # in and out of the hidden state; convolution, step there and back, B, C and A
        params=3 * hidden * inner + inner * (taps + 2 * step_rank + 3 * state_size),
        state_width=inner * state_size,
        conv_width=inner * (taps - 1),
        ring_width=inner + (2 * inner + 2 * state_size),
    )


def _lightning(fields: Fields) -> Mixer:
    """Lightning attention: arXiv 2501.08313; a constant decay per head, no convolution."""
    hidden, heads = need(fields, "hidden_size"), need(fields, "num_attention_heads")
    head_dim = need(fields, "head_dim") if fields.get("head_dim") else hidden // heads
    return Mixer(
        params=5 * hidden * heads * head_dim,
        state_width=heads * head_dim**2,
        ring_width=3 * heads * head_dim,
    )


def _short_conv(fields: Fields) -> Mixer:
    """A gated short convolution alone (LFM2): no state beyond its window."""
    hidden, kernel = need(fields, "hidden_size"), need(fields, "conv_L_cache")
    return Mixer(
        params=4 * hidden**2 + hidden * kernel,
        conv_width=hidden * (kernel - 1),
        ring_width=hidden,
    )


def _expanded(fields: Fields, name: str) -> int:
    return need(fields, name) * need(fields, "hidden_size")


def _bamba(fields: Fields) -> Mixer:
    inner = need(fields, "mamba_d_ssm") if fields.get("mamba_d_ssm") else 0
    return _mamba2(
        fields, inner or _expanded(fields, "mamba_expand"),
        "mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_conv",
    )  # fmt: skip


def _nemotron_h(fields: Fields) -> Mixer:
    inner = need(fields, "mamba_num_heads") * need(fields, "mamba_head_dim")
    return _mamba2(fields, inner, "mamba_num_heads", "n_groups", "ssm_state_size", "conv_kernel")


def _zamba2(fields: Fields) -> Mixer:
    return _mamba2(
        fields, _expanded(fields, "mamba_expand"),
        "n_mamba_heads", "mamba_ngroups", "mamba_d_state", "mamba_d_conv",
    )  # fmt: skip


def _pure_mamba2(fields: Fields) -> Mixer:
    inner = _expanded(fields, "expand")
    return _mamba2(fields, inner, "num_heads", "n_groups", "state_size", "conv_kernel")


def _jamba(fields: Fields) -> Mixer:
    inner = _expanded(fields, "mamba_expand")
    return _mamba1(fields, inner, "mamba_d_state", "mamba_dt_rank", "mamba_d_conv")


def _pure_mamba1(fields: Fields) -> Mixer:
    inner = need(fields, "intermediate_size")
    return _mamba1(fields, inner, "state_size", "time_step_rank", "conv_kernel")


FAMILIES: dict[str, Callable[[Fields], Mixer]] = {
    "qwen3_next": _gated_delta,
    "qwen3_5_text": _gated_delta,
    "qwen3_5_moe_text": _gated_delta,
    "olmo_hybrid": _gated_delta,
    "kimi_linear": lambda fields: _kimi_delta(fields, low_rank_gates=True),
    "bailing_hybrid": lambda fields: _kimi_delta(fields, low_rank_gates=False),
    "granitemoehybrid": _bamba,
    "bamba": _bamba,
    "falcon_h1": _bamba,
    "nemotron_h": _nemotron_h,
    "zamba2": _zamba2,
    "mamba2": _pure_mamba2,
    "jamba": _jamba,
    "mamba": _pure_mamba1,
    "falcon_mamba": _pure_mamba1,
    "minimax": _lightning,
    "lfm2": _short_conv,
    "lfm2_moe": _short_conv,
}
