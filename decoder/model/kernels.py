"""The one place where the decoder meets ``moesd_kernels``. Everything works without it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from decoder.errors import UserError, explained

logger = logging.getLogger(__name__)

RaggedOp = Callable[..., Tensor]

AttentionName = Literal["auto", "portable"]
# "auto" uses the attention kernel where there is one, "portable" never does.
ATTENTION: tuple[str, ...] = get_args(AttentionName)

QUANTIZED = ("int8", "int4")  # weight formats that plain weights can be turned into
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def accelerate(model: torch.nn.Module, batch_invariant: bool = False) -> bool:
    """Let ``moesd_kernels`` run the model's experts, linears, norms and routers.

    With the settings of an earlier ``moesd_kernels.accelerate``, if its owner has called that, and
    ``batch_invariant`` where either asks for it.

    Returns:
        Whether it did; when it could not, one log line says why and the model is unchanged.

    Raises:
        UserError: ``MOESD_CPU_ISA`` names no instruction set of this processor.
    """
    if any(parameter.device.type == "cpu" for parameter in model.parameters()):
        _check_instruction_set(_cpu_ops(torch.device("cpu"), torch.float32))
    try:
        import moesd_kernels
        from moesd_kernels.hooks.experts import settings_of

        backend, invariant = settings_of(model)
        invariant |= batch_invariant
        moesd_kernels.accelerate(model, backend=backend, batch_invariant=invariant)
    except (ImportError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        names = type(model).__name__, type(error).__name__
        logger.warning("moesd_kernels not used for %s (%s: %s)", *names, error)
        return False
    return True


def quantized(model: torch.nn.Module, weight_format: str) -> torch.nn.Module:
    """``model``, its matrices now in one of ``QUANTIZED``; ``UserError`` where none can be."""
    import moesd_kernels

    with explained(f"{type(model).__name__} cannot be {weight_format}"):
        return moesd_kernels.quantize(model, weight_format)


def with_int8_activations(model: torch.nn.Module) -> torch.nn.Module:
    """``model``, its quantised layers now rounding their inputs to eight bits.

    Raises:
        UserError: none of them can, or it is not on a CPU with our operators.
    """
    import moesd_kernels

    if cpu_isa() is None or any(p.device.type != "cpu" for p in model.parameters()):
        raise UserError("activations of eight bits need a model on a CPU, and its C++ operators")
    with explained("activations stay as they are"):
        return moesd_kernels.use_int8_activations(model)


def multiplies_integers() -> bool:
    """Whether products of integers of eight bits take this processor less than those of bf16.

    Four-bit weights then make a draft's steps cheaper; elsewhere unpacking costs more than memory.
    """
    return cpu_isa() in ("avx512_bf16", "amx")


def hastened(draft: torch.nn.Module, rows: int) -> torch.nn.Module:
    """``draft``, in numbers that steps of ``rows`` tokens take least time with.

    What it proposes is verified all the same. Packed weights may be given inputs of eight bits, or
    be stored anew; plain ones stay as they are.
    """
    if not multiplies_integers() or any(p.device.type != "cpu" for p in draft.parameters()):
        return draft
    from moesd_kernels.hooks.int8_rows import suit_processor

    return suit_processor(draft, rows, tiles=cpu_isa() == "amx")


def keeping_quantized(others: bool) -> AbstractContextManager[None]:
    """A block in which transformers reads our own integers, which it cannot unpack.

    Args:
        others: leave FP8 and MXFP4 as they are stored, too.
    """
    try:
        import moesd_kernels
    except ImportError:
        return nullcontext()
    return moesd_kernels.keep_quantized(others=others)


def load_gguf(file: Path, dtype: torch.dtype) -> Any:
    """The model of a GGUF file, its matrices in the file's blocks."""
    import moesd_kernels

    return moesd_kernels.load_gguf(file, dtype)


def gguf_file(file: Path) -> Any:
    """A GGUF file, its header read and checked (``moesd_kernels.hooks.loading.GgufFile``)."""
    from moesd_kernels.hooks.loading import GgufFile

    return GgufFile(file)


def gguf_config(source: Any) -> Any:
    """transformers' configuration of the model in a ``gguf_file``."""
    from moesd_kernels.hooks.loading.gguf.config import config_of

    config, _ = config_of(source)
    return config


def gguf_dense_weights(source: Any) -> dict[str, Tensor]:
    """fp32 weights of a ``gguf_file`` without experts, by transformers' names."""
    from moesd_kernels.hooks.loading import dense_weights

    return dense_weights(source)


def to_int4(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [N], 32 to a step, in four bits: uint8 [N / 2] and bf16 steps [N / 32]."""
    from moesd_kernels.formats import quantize

    codes, steps = quantize(numbers[None], "int4")
    return codes[0], steps[0]


def from_int4(codes: Tensor, steps: Tensor) -> Tensor:
    """The numbers [N] that ``to_int4`` keeps, in fp32."""
    from moesd_kernels.formats import dequantize

    return dequantize(codes[None], steps[None], "int4", torch.float32)[0]


def cache_folder(name: str) -> Path:
    """This user's folder ``name`` of the cache, made where it is not there.

    Raises:
        UserError: it cannot be made, or others could have written to it.
    """
    with explained(f"there is no cache folder {name!r}"):
        from moesd_kernels.cache import cache_folder

        return cache_folder(name)


def cache() -> Any:
    """What is done with folders of the cache: ``moesd_kernels.cache``."""
    from moesd_kernels import cache

    return cache


def left_as_found(model: torch.nn.Module) -> AbstractContextManager[None]:
    """A block that takes back what it made of ``model``'s experts and forwards if it raises."""
    try:
        from moesd_kernels.hooks.accelerate import left_as_found
    except ImportError:
        return nullcontext()
    return left_as_found(model)


def ragged_attention_op(
    device: torch.device, dtype: torch.dtype, attention: AttentionName = "auto"
) -> RaggedOp | None:
    """The attention kernel for this device and dtype, or ``None``: portable forms then.

    Raises:
        ValueError: ``attention`` is none of ``ATTENTION``.
        UserError: ``MOESD_CPU_ISA`` names no instruction set of this processor.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}")
    if attention == "auto" and on_gpu(device) and dtype in _DTYPES:
        from moesd_kernels.dense.triton import attention as kernels
        from moesd_kernels.registered import guarded

        return guarded(kernels.ragged_attention)
    ops = _cpu_ops(device, dtype) if attention == "auto" else None
    _check_instruction_set(ops)
    return None if ops is None else ops.ragged_attention.default


def recurrent_operators() -> Any:
    """The operators of layers with a recurrent state: ``moesd_kernels.dense.recurrent``.

    Raises:
        UserError: there are none.
    """
    with explained("models with recurrent state need moesd_kernels"):
        from moesd_kernels.dense import recurrent

        return recurrent


@functools.cache
def argmax_op(device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
    """``logits [..., V] -> (places [...], undefined [...])`` in one op, or ``None``."""
    if on_gpu(device) and dtype in _DTYPES:
        from moesd_kernels.dense.triton.argmax_kernel import argmax
        from moesd_kernels.registered import guarded

        return guarded(argmax)
    ops = _cpu_ops(device, dtype)
    return None if ops is None else ops.argmax.default


@functools.cache
def sampling_ops(device: torch.device, dtype: torch.dtype) -> Any | None:
    """The sampler's ``probs``, ``race``, ``rejection`` and ``agree`` as kernels, or ``None``."""
    if not on_gpu(device) or dtype not in _DTYPES:
        return None
    from moesd_kernels.dense.triton.sampling import ops
    from moesd_kernels.registered import guarded

    names = ("probs", "race", "rejection", "agree")
    return SimpleNamespace(**{name: guarded(getattr(ops, name)) for name in names})


@functools.cache
def race_op(device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
    """``probs [..., V], keys [...] -> tokens [...]`` of exponential races on a CPU, or ``None``."""
    ops = _cpu_ops(device, dtype) if dtype == torch.float32 else None
    return None if ops is None else ops.race.default


@functools.cache
def on_gpu(device: torch.device) -> bool:
    """Whether tensors of this device have Triton kernels."""
    if device.type != "cuda":
        return False
    try:
        from moesd_kernels.experts import triton as kernels
    except ImportError:
        return False
    return kernels.unavailable_reason() is None


def _cpu_ops(device: torch.device, dtype: torch.dtype) -> Any | None:
    """``torch.ops.moesd`` where tensors of this kind have C++ operators, or ``None``."""
    if device.type != "cpu" or dtype not in _DTYPES:
        return None
    try:
        from moesd_kernels.dense import ops
    except ImportError:
        return None
    return None if ops.unavailable() is not None else torch.ops.moesd


def _check_instruction_set(ops: Any | None) -> None:
    """Have it chosen now: the first operator would raise it, and be blamed for it."""
    try:
        if ops is not None:
            ops.cpu_isa()
    except RuntimeError as error:
        raise UserError(str(error).partition("\n")[0]) from error


def cpu_isa() -> str | None:
    """The instruction set that the C++ operators run on here, or ``None`` without them."""
    ops = _cpu_ops(torch.device("cpu"), torch.float32)
    _check_instruction_set(ops)
    return None if ops is None else str(ops.cpu_isa())


def walk() -> Any:
    """What walks over a model's layers; there is one wherever there is the attention kernel."""
    from moesd_kernels.hooks import walk

    return walk


def is_batch_invariant(model: torch.nn.Module) -> bool:
    """Whether that was asked for when the model was accelerated."""
    from moesd_kernels.hooks.experts import settings_of

    return settings_of(model).batch_invariant
