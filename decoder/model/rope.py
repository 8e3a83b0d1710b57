"""Rotary embeddings whose frequencies depend on how long a sequence is.

transformers' ``longrope`` and ``dynamic`` choose them by the largest position of a call, which in a
batch is another row's. Here every token has its own: a token of a prompt by the length of that
prompt, any later one by its own position. That is what a row alone would get, decoded token by
token with a cache, however many drafts are verified at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_LONGROPE = "longrope"
_alone = threading.RLock()  # these modules keep what the last call needed: one decoder at a time


class RowRope:
    """The rotary modules of a model, made to go by each row's own length.

    Args:
        modules: those whose frequencies depend on lengths.
        max_batch_size: cache rows.
        device: of the model.
    """

    def __init__(self, modules: list[nn.Module], max_batch_size: int, device: torch.device) -> None:
        self._modules = modules
        # Of prompts while they are read; elsewhere a token's position says all.
        self._prompts = torch.zeros(max_batch_size, dtype=torch.int64, device=device)

    @contextmanager
    def reading(self, rows: Tensor, lengths: Tensor) -> Iterator[None]:
        """Forwards inside read prompts of ``lengths`` ``[R]`` into cache ``rows`` ``[R]``."""
        self._prompts[rows] = lengths
        try:
            yield
        finally:
            self._prompts.zero_()

    @contextmanager
    def used(self, rows: Tensor, positions: Tensor) -> Iterator[None]:
        """A forward of tokens at ``positions`` ``[B, Q]`` of cache ``rows`` ``[B]``."""
        lengths = torch.maximum(positions + 1, self._prompts[rows][:, None])
        with _alone, ExitStack() as stack:
            for module in self._modules:
                by_row = partial(_by_row, module, module.forward, lengths, threading.get_ident())
                stack.enter_context(_replaced(module, by_row))
            yield


def row_rope(
    model: nn.Module, max_batch_size: int, max_length: int, device: torch.device
) -> RowRope | None:
    """What a model needs for rows of ``max_length`` tokens, drafts included; mostly nothing."""
    modules = []
    for module in model.modules():
        for layer_type in _layer_types(module):
            original = _original_length(module, layer_type)
            if original is not None and max_length >= original and module not in modules:
                modules.append(module)
    return RowRope(modules, max_batch_size, device) if modules else None


def looks_at_positions(model: nn.Module) -> bool:
    """Whether frequencies are chosen by positions, on the host: no graph can hold that."""
    return any(
        _original_length(module, layer_type) is not None
        for module in model.modules()
        for layer_type in _layer_types(module)
    )


def _layer_types(module: nn.Module) -> list[str | None]:
    """What a rotary module has frequencies for; of any other module, nothing."""
    kinds = getattr(module, "rope_type", None)
    return list(kinds) if isinstance(kinds, dict) else [None]


def _kind(module: Any, layer_type: str | None) -> str:
    kinds = getattr(module, "rope_type", None)
    return str(kinds[layer_type] if isinstance(kinds, dict) else kinds)


def _original_length(module: Any, layer_type: str | None) -> int | None:
    """Up to which length the frequencies are constant; ``None`` when they always are."""
    kind = _kind(module, layer_type)
    if kind == _LONGROPE:
        rope = module.config.rope_parameters
        return (rope if layer_type is None else rope[layer_type])[
            "original_max_position_embeddings"
        ]
    return module.original_max_seq_len if "dynamic" in kind else None


def _by_row(
    module: Any,
    forward: Callable[..., tuple[Tensor, Tensor]],
    lengths: Tensor,
    thread: int,
    x: Tensor,
    position_ids: Tensor,
    layer_type: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[B, Q, D]`` from the module's own forward, called once per length."""
    call = forward if layer_type is None else partial(forward, layer_type=layer_type)
    original = _original_length(module, layer_type)
    if original is None or threading.get_ident() != thread:
        return call(x, position_ids)
    lengths = lengths.clamp(min=original)
    if _kind(module, layer_type) == _LONGROPE:
        lengths = lengths.clamp(max=original + 1)  # there are two sets of factors, short and long
        distinct = [original, original + 1]
    else:
        call(x, torch.zeros_like(position_ids))  # it forgets longer calls only at a shorter one
        distinct = sorted(set(lengths.flatten().tolist()))
    chosen: list[Tensor] = []  # cosines and sines so far
    for length in distinct:
        mine = lengths == length
        # The largest position of the call is what the module goes by.
        last = torch.full_like(position_ids[..., :1], length - 1)
        both = call(x, torch.cat([position_ids.where(mine, 0), last], dim=-1))
        found = [part[..., :-1, :] for part in both]
        pairs = zip(found, chosen or found, strict=True)
        chosen = [new.where(mine[..., None], old) for new, old in pairs]
    cos, sin = chosen
    return cos, sin


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module`` runs ``forward`` inside."""
    previous = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous
