"""Attention over ragged cache rows, as a function transformers models can call.

Registered as ``"moesd_ragged"``. During a forward of ``ModelRunner`` it reads the cache slabs
directly and derives what a query may see from its position alone, so no mask is passed through the
model. Outside such a forward it is transformers' ``sdpa``.

Three forms, one meaning (query at position p sees positions max(0, p - window + 1) .. p):

* the op of ``moesd_kernels`` when there is one (no copy, no mask),
* ``packed``: SDPA with the query heads of a group folded into the query axis, so that grouped keys
  are not copied per head,
* ``reference``: plain arithmetic, also for sinks and score caps.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from decoder.round import on_host

from .cache import whole_blocks
from .kernels import RaggedOp
from .probe import LENGTH, shown_mask, window_of

NAME = "moesd_ragged"


@dataclass(slots=True)
class Placement:
    """Where the queries of one forward stand.

    Attributes:
        rows: ``[B]`` int64 cache rows; ``None`` when they are 0 … B - 1.
        positions: ``[B, Q]`` int64 absolute positions; -1 marks a padding query, whose output is
            unspecified but finite.
        view_length: how far the portable forms look; at least the largest position + 1. On a GPU
            rounded up to whole blocks, of which cache rows are made.
        op: the kernel, or ``None`` for the portable forms.
        windows: sliding window of each attention module, by ``id``, as its model's own mask says;
            0 is none. Modules not listed pass theirs with the call.
        probing: whether this forward fills ``windows`` and counts ``calls``.
        calls: of the attention function.
    """

    rows: Tensor | None
    positions: Tensor
    view_length: int
    op: RaggedOp | None = None
    windows: dict[int, int] = field(default_factory=dict)
    probing: bool = False
    calls: int = 0
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _biases: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.positions.device.type != "cpu":
            self.view_length = whole_blocks(self.view_length)

    def visible(self, window: int, group: int = 1) -> Tensor:
        """``[B, 1, group * Q, view_length]`` bool: may a query see a position. Built once."""
        key = (window, group)
        if key not in self._masks:
            if group > 1:
                self._masks[key] = self.visible(window).repeat(1, 1, group, 1)
                return self._masks[key]
            key_position = torch.arange(self.view_length, device=self.positions.device)
            # A padding query sees position 0: a row with nothing visible would be NaN.
            position = self.positions.clamp(min=0)[:, None, :, None]
            mask = key_position <= position
            if window > 0:
                mask &= key_position > position - window
            self._masks[key] = mask
        return self._masks[key]

    def sdpa_mask(self, window: int, group: int, dtype: torch.dtype) -> Tensor:
        """``visible`` in the form that SDPA computes with: bool on the CPU, else 0 and -inf.

        On a GPU it would make that of a bool mask in every layer, and copy it once more where the
        rows are not aligned.
        """
        if self.positions.device.type == "cpu":
            return self.visible(window, group)
        key = (window, group, dtype)
        if key not in self._biases:
            bias = additive(self.visible(window), dtype)
            self._biases[key] = bias.repeat(1, 1, group, 1) if group > 1 else bias
        return self._biases[key]


def place(
    rows: Tensor,
    positions: Tensor,
    length: int,
    limit: int,
    op: RaggedOp | None,
    windows: dict[int, int],
) -> Placement:
    """A placement that looks at ``length`` positions, without a kernel at whole blocks of them."""
    if op is not None:
        return Placement(rows, positions, length, op, windows)
    identity = on_host(rows.device) and rows.tolist() == list(range(len(rows)))
    view = min(whole_blocks(length), max(limit, LENGTH) + 1)  # rows may be shorter than the trial's
    return Placement(None if identity else rows, positions, view, None, windows)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to scores: 0 where ``visible``, else -inf; same shape, in ``dtype``."""
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill_(~visible, -torch.inf)


_active = threading.local()


@contextmanager
def placed(placement: Placement) -> Iterator[None]:
    """Make ``placement`` the one that attention calls of this thread use.

    On a GPU also without cuDNN: Hopper prefers its attention, which plans for tens of milliseconds
    at each new shape, and shapes change with every bucket of rows and positions.
    """
    previous = getattr(_active, "placement", None)
    cudnn = placement.positions.device.type != "cpu" and torch.backends.cuda.cudnn_sdp_enabled()
    _active.placement = placement
    if cudnn:
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        _active.placement = previous
        if cudnn:
            torch.backends.cuda.enable_cudnn_sdp(True)


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    placement: Placement,
    *,
    scale: float,
    window: int = 0,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention of each query over the visible positions of its cache row.

    Args:
        query: ``[B, Q, Hq, D]``.
        keys: ``[rows, S, Hkv, D]`` slab; values: ``[rows, S, Hkv, Dv]``.
        placement: rows and positions of the queries.
        scale: factor on the scores.
        window: how many latest positions a query sees; 0 is all.
        sinks: ``[Hq]`` logits of a virtual position that takes probability and gives nothing.
        softcap: scores become ``softcap * tanh(score / softcap)``.

    Returns:
        ``[B, Q, Hq, Dv]`` in ``query.dtype``.
    """
    if placement.op is not None and softcap is None:
        return placement.op(
            query, keys, values, placement.positions, scale, window, sinks, placement.rows
        )
    keys, values = _selected(keys, placement), _selected(values, placement)
    if sinks is not None or softcap is not None:
        return reference_attention(
            query, keys, values, placement.visible(window), scale, sinks, softcap
        )
    B, Q, Hq, _ = query.shape
    group = Hq // keys.shape[2]
    mask = placement.sdpa_mask(window, group, query.dtype)
    # [B, Q, Hkv, g, D] -> [B, Hkv, g * Q, D]; the mask repeats Q rows g times to match.
    packed = query.unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    out = torch.nn.functional.scaled_dot_product_attention(
        packed, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask, scale=scale
    )  # [B, Hkv, g * Q, Dv]
    return out.unflatten(2, (group, Q)).permute(0, 3, 1, 2, 4).reshape(B, Q, Hq, -1)


def reference_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """``ragged_attention`` in plain arithmetic; keys and values ``[B, S, Hkv, D]``.

    On a CPU in fp64: how a library's product rounds depends on how many queries and positions it
    has, and so on the batch, which results of fewer bits then do not show.
    """
    on_cpu = query.device.type == "cpu"
    dtype = torch.float64 if on_cpu else torch.promote_types(query.dtype, torch.float32)
    B, Q, Hq, _ = query.shape
    grouped = query.to(dtype).unflatten(2, (keys.shape[2], -1))  # [B, Q, Hkv, g, D]
    packed = grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, Hkv, g * Q, D]
    scores = (packed @ keys.to(dtype).permute(0, 2, 3, 1) * scale).view(B, Hq, Q, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.to(dtype).view(1, -1, 1, 1).expand(B, -1, Q, 1)
        scores = torch.cat([scores, column], dim=-1)
    probs = scores.softmax(-1)[..., : keys.shape[1]].reshape(*packed.shape[:3], -1)
    out = probs @ values.to(dtype).transpose(1, 2)  # [B, Hkv, g * Q, Dv]
    return out.view(B, Hq, Q, -1).transpose(1, 2).to(query.dtype)


def _selected(slab: Tensor, placement: Placement) -> Tensor:
    """``[B, view_length, heads, D]`` of the rows in use; a view when they are the first B rows."""
    view = slab[:, : placement.view_length]
    if placement.rows is None:
        return view[: placement.positions.shape[0]]
    return view.index_select(0, placement.rows)


def attention_function(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: ``[B, Hq, Q, D]`` query, ``[rows, Hkv, S, D]`` slabs.

    Returns:
        ``([B, Q, Hq, Dv], None)``.
    """
    placement: Placement | None = getattr(_active, "placement", None)
    if placement is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError(
            f"expected attention without a position bias, got one in {type(module).__name__}"
        )
    if placement.probing:
        placement.calls += 1
        placement.windows[id(module)] = window_of(attention_mask)
    out = ragged_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        placement,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=placement.windows.get(id(module), sliding_window or 0),
        sinks=s_aux,
        softcap=softcap,
    )
    return out.contiguous(), None  # as transformers' own: some models take a view of it


def mask_function(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask interface: while probing, a stand-in that ``window_of`` reads.

    The window reaches the attention function through the same path as a real mask would, so
    whatever a model does to choose a layer's mask is obeyed.
    """
    placement: Placement | None = getattr(_active, "placement", None)
    if placement is None:
        from transformers.masking_utils import sdpa_mask

        return sdpa_mask(*args, **kwargs)
    return shown_mask(kwargs["mask_function"], kwargs.get("local_size"), kwargs["kv_length"])


def register() -> str:
    """Make ``"moesd_ragged"`` known to transformers; idempotent. Returns the name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)
    return NAME
