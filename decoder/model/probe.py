"""Whether a model computes over the ragged cache what it computes by itself.

Before anything is decoded, two short rows run as decoding will run them: out of order, from
different positions, one with drafts that are rolled back. Their logits must be those of the model's
own plain forward. That finds positions taken from elsewhere than the call, attention that sees
later tokens, layers that keep a state, and whatever a model does that nobody has thought of. What
five tokens cannot show, windows above all, is read off the model's masks (``attention.py``).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from decoder.checkpoint.weights import few
from decoder.errors import UserError

from .cache import RaggedCache
from .loading import quiet
from .support import broken_weights

LENGTH = 5  # tokens of each row
TRIED = 4  # of a row at once, the longest draft that is taken back among them
_UNKNOWN_MASK = -1
_SENSITIVITIES = 2  # every layer rounds, not the first one's input alone; few tokens are looked at


class Step(NamedTuple):
    """Attributes: ``rows [R]``, ``input_ids`` and ``positions [R, Q]``, ``checked [R, Q]`` bool:
    the tokens whose logits count, which are those that stay."""

    rows: Tensor
    input_ids: Tensor
    positions: Tensor
    checked: Tensor


@contextmanager
def refusing(model: Any) -> Iterator[None]:
    """Whatever fails inside says that the model cannot be decoded.

    Raises:
        UserError: one line with the reason. Lack of memory is no reason and passes.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        raise refusal(model, f"{type(error).__name__}: {message[:300]}") from error


def refusal(model: Any, why: str) -> UserError:
    return UserError(
        f"{type(model).__name__} cannot be decoded over a ragged cache: expected every layer to "
        f"use transformers' attention interface, its cache and the given positions, got {why}"
    )


def sample(model: Any, vocab_size: int, max_batch_size: int) -> Tensor:
    """``[R, LENGTH]`` ordinary token ids for two rows, or for one where there is one.

    Not the padding token: its embedding is zero, and scaled zeros would compare equal. Nor any
    other that a config names, which may stand for an image.
    """
    configs = model.config, model.config.get_text_config(decoder=True)
    special = {
        value
        for config in configs
        for name, value in vars(config).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    ordinary = [i for i in range(min(vocab_size, 64)) if i not in special] or [0]
    rows = [[7 * row + i for i in range(LENGTH)] for row in range(min(2, max_batch_size))]
    ids = [[ordinary[i % len(ordinary)] for i in row] for row in rows]
    return torch.tensor(ids, device=model.get_input_embeddings().weight.device)


def steps(ids: Tensor) -> tuple[Step, Step]:
    """Two forwards over the rows of ``ids`` ``[R, LENGTH]``, R being 1 or 2.

    The first row drafts two tokens that are wrong and rolled back; the second is behind, so that
    each forward has padding and the rows stand at different positions.
    """
    R, device = len(ids), ids.device
    first = torch.tensor([[0, 1, 2, 3], [0, 1, -1, -1]], device=device)[:R]
    second = torch.tensor([[2, 3, 4], [2, -1, -1]], device=device)[:R]
    drafted = ids[:, :TRIED].clone()
    drafted[0, 2:] = ids[0, :2]
    order = torch.arange(R, device=device)
    return (
        Step(order.flip(0), drafted.flip(0), first.flip(0), ((first >= 0) & (first < 2)).flip(0)),
        Step(order, ids[:, 2:5], second, second >= 0),
    )


def shown_mask(mask: Callable[..., Tensor], local_size: int | None, length: int) -> Tensor:
    """A stand-in for a mask, ``[1, 1, 1, 1]`` int64, from which ``window_of`` reads its window.

    Only masks that show a query at p the latest positions <= p have one. They are looked at around
    the window's edges, and here and there up to a million positions.

    Args:
        mask: transformers' mask function, of indices of batch, head, query and key.
        local_size: the window that transformers names; ``None`` is none.
        length: positions that a mask which is a table knows.
    """
    window = local_size or 0
    near, far = torch.arange(-1, 3), 2 ** torch.arange(20)
    edges = torch.cat([torch.arange(4) * window, far])
    places = (edges[:, None] + near).clamp(min=0).unique()
    try:
        shown = _shown(mask, places)
    except IndexError:
        places = places[places < length]
        shown = _shown(mask, places)
    query, key = places[:, None], places[None, :]
    expected = (key <= query) & ((key > query - window) | (window == 0))
    is_known = torch.equal(shown.broadcast_to(expected.shape), expected)
    return torch.full((1, 1, 1, 1), window if is_known else _UNKNOWN_MASK)


def _shown(mask: Callable[..., Tensor], places: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.int64)
    return mask(zero, zero, places[:, None], places[None, :]).cpu()


def window_of(mask: Tensor | None) -> int:
    """How many latest positions an attention call's mask shows; 0 is all.

    Raises:
        NotImplementedError: it shows others, or is not a mask of transformers' mask interface.
    """
    if mask is None:
        return 0
    if mask.numel() != 1:
        raise NotImplementedError("a mask that is not of transformers' mask interface")
    if int(mask) == _UNKNOWN_MASK:
        raise NotImplementedError("a mask that is neither causal nor a causal window")
    return int(mask)


def check_layers(model: Any, calls: int, cache: RaggedCache) -> None:
    """Refuse a model whose cached layers are not all attended to by the interface."""
    written = sum(layer.is_initialized for layer in cache.ragged_layers)
    recurrent = cache.recurrent is not None and cache.recurrent.layers
    if calls < written or not (calls or recurrent):
        raise refusal(model, f"{calls} attention calls for {written} cached layers")


def check_windows(model: Any, windows: dict[int, int], max_length: int) -> None:
    """Refuse rows beyond a window that transformers' own cache has and the model's masks have not.

    ``generate`` forgets there what a plain forward sees.

    Args:
        windows: of attention modules, by ``id``.
    """
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if windows.get(id(module)) == 0 and index is not None and index < len(layers):
            kept = getattr(layers[index], "sliding_window", None)
            if kept is not None and kept < max_length:
                raise UserError(
                    f"{type(model).__name__} attends to all positions but its cache keeps {kept}; "
                    f"expected rows of at most {kept} tokens, drafts included, got {max_length}"
                )


def splits(head: Any, output: Any, logits: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``logits`` are a head's of the last states of a base model's output, as they are.

    Mamba's states are fp32 in a model of another ``dtype``, and rounded for the head.
    """
    states = getattr(output, "last_hidden_state", None)
    return states is not None and states.dtype == dtype and torch.equal(head(states), logits)


def check(model: Any, ids: Tensor, tried: Sequence[tuple[Step, Tensor]]) -> None:
    """Refuse a model whose logits over the cache are not those of its plain forward.

    Args:
        model: as it was found, with its own attention.
        ids: ``[R, LENGTH]``.
        tried: its steps, and the logits ``[R, Q, V]`` of each.

    Raises:
        UserError: they differ by more than rounding, with what was found out about the reason.
    """
    own = _own_logits(model, ids)
    weights = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    dtypes = [t.dtype for t in (own, *weights) if t.dtype.is_floating_point]
    if any(getattr(module, "int8_activations", False) for module in model.modules()):
        dtypes.append(torch.bfloat16)  # a code's step is as coarse as its numbers
    dtype = min(dtypes, key=lambda dtype: dtype.itemsize)  # logits are often widened
    for step, ragged in tried:
        index = step.positions.clamp(min=0)[..., None].expand(-1, -1, own.shape[-1])
        expected = own[step.rows].gather(1, index)
        difference = _difference(ragged[step.checked], expected[step.checked], dtype)
        if not is_rounding(model, ids, difference, dtype, own):
            if names := broken_weights(model):
                raise UserError(f"weights must be numbers, got NaN or infinities in {few(names)}")
            raise refusal(model, _reason(model, ids, own, dtype, difference))


def is_rounding(
    model: Any, ids: Tensor, difference: float, dtype: torch.dtype, own: Tensor | None = None
) -> bool:
    """Whether rounding may be all of the share by which two forwards of ``ids`` differ.

    Deep models make more of it than others, and are asked. ``own``: their logits, if known.
    """
    if difference <= _tolerance(dtype):
        return True
    if _is_exact(dtype) or not difference < math.inf:
        return False
    own = _own_logits(model, ids) if own is None else own
    return difference <= _SENSITIVITIES * _sensitivity(model, ids, own, dtype)


def _own_logits(model: Any, ids: Tensor) -> Tensor:
    """``[R, Q, V]`` of the model's plain forward, called as ``generate`` calls it."""
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand(*ids.shape)
    with quiet():  # of kernels that it would be faster with, which decoding does not use
        return model(**inputs).logits


def _difference(logits: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """How far logits ``[T, V]`` are off, as a share of their own spread.

    That of the worst token; in half precision of the middle one, since rounding turns a router's
    choice here and there. What is not finite in the model's own forward is left to decoding, which
    names the row.
    """
    finite = expected.isfinite()
    expected = expected.double().where(finite, 0.0)
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    error = (logits.double().where(finite, 0.0) - expected).norm(dim=-1)
    shares = torch.where(error == 0, 0.0, error / spread)  # [T]
    return float(shares.max() if _is_exact(dtype) else shares.median())


def _tolerance(dtype: torch.dtype) -> float:
    """Of ``_difference``: above what rounding does through many layers, below what any other
    position does."""
    if _is_exact(dtype):
        # transformers takes softmaxes and cosines in fp32 even where the model is fp64.
        dtype = torch.float32
    elif dtype.itemsize > 2:
        dtype = torch.bfloat16  # it may multiply in it
    return torch.finfo(dtype).eps ** 0.5


def _sensitivity(model: Any, ids: Tensor, own: Tensor, dtype: torch.dtype) -> float:
    """How far the model's own logits move when its embeddings do by one rounding.

    Deep models with large activations amplify one to a tenth of the logits' spread in half
    precision, which says nothing about how they are run.
    """
    random = torch.Generator().manual_seed(0)

    def nudged(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=random).to(output) * 2 - 1
        return output * (1 + torch.finfo(dtype).eps / 2 * signs)

    shares = []
    for _ in range(3):
        hook = model.get_input_embeddings().register_forward_hook(nudged)
        try:
            moved = _own_logits(model, ids)
        finally:
            hook.remove()
        shares.append(_difference(moved.flatten(0, 1), own.flatten(0, 1), dtype))
    return max(shares)


def _is_exact(dtype: torch.dtype) -> bool:
    return dtype.itemsize > 2 and torch.get_float32_matmul_precision() == "highest"


def _reason(model: Any, ids: Tensor, own: Tensor, dtype: torch.dtype, difference: float) -> str:
    shorter = _own_logits(model, ids[:, :-2])
    if not _difference(shorter[0], own[0, :-2], dtype) <= _tolerance(dtype):
        return "attention that lets tokens see later ones"
    differing = f"logits that differ from its own by {difference:.1%}"
    if "position_ids" in inspect.signature(model.forward).parameters:
        return differing
    return f"{differing}: it takes no position_ids and counts from the length of a cache"
