"""Back-ends of ``fused_experts``: which exist, which can run here, which one is chosen.

Nothing is imported or compiled before a back-end is first asked for.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moesd_kernels.formats import WEIGHT_FORMATS

from .reference import fused_experts_reference, fused_experts_torch
from .spec import ExpertsSpec, ExpertsWeights, TopK
from .triton.formats import NUMBERS

logger = logging.getLogger(__name__)

HALF = frozenset({torch.bfloat16, torch.float16})
SINGLE = HALF | {torch.float32}
ANY = SINGLE | {torch.float64}
PLAIN = frozenset({"plain"})
ALL_PLAIN = ("plain", "plain")
EVERY_FORMAT = frozenset(WEIGHT_FORMATS)


class Run(Protocol):
    """A back-end: the expert layer on arguments that ``validation.check_arguments`` passed."""

    def __call__(
        self,
        x: Tensor,
        weights: ExpertsWeights,
        routing: TopK,
        spec: ExpertsSpec,
        out: Tensor | None = None,
        *,
        batch_invariant: bool = False,
    ) -> Tensor:
        """``[T, H]`` for ``x`` ``[T, H]``: ``out`` when given, which must not share memory with an
        input."""


class QuickRun(Protocol):
    """A back-end's way of a decode step: checks, decides and computes in compiled code.

    When the weights come from memory, so does the interpreter's code, and what it runs between two
    layers costs as much as a small one.
    """

    def __call__(
        self,
        hidden_states: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        *options: Any,
    ) -> Tensor | None:
        """The new ``[T, H]`` result; None where the call is another back-end's, or is wrong.

        The last arguments are ``ExpertsSpec.op_options`` and the two scales.
        Nothing is raised for arguments that do not fit together: those that the checks find are
        raised by them, with their names.
        """


@dataclass(frozen=True, slots=True)
class Backend:
    """What a back-end can do.

    Attributes:
        name: its public name.
        devices: device types it runs on; None for all.
        dtypes: dtypes of ``hidden_states`` it takes.
        unavailable_reason: why it cannot run in this process at all, or None.
        load: imports it and returns its function.
        quick: imports its way of a decode step, where it has one. Its rows must be independent of
            the batch, because it is not told whether that is wanted.
        automatic: whether "auto" may choose it.
        compiled: whether it is a compiled kernel: no gradients, weights contiguous.
        invariant: whether it honours ``batch_invariant``.
        formats: weight formats it reads.
        rounding: whether it rounds activations to eight bits where it is asked to.
    """

    name: str
    devices: frozenset[str] | None
    dtypes: frozenset[torch.dtype]
    unavailable_reason: Callable[[], str | None]
    load: Callable[[], Run]
    quick: Callable[[], QuickRun] | None = None
    automatic: bool = True
    compiled: bool = True
    invariant: bool = True
    formats: frozenset[str] = PLAIN
    rounding: bool = False


class CallTraits(NamedTuple):
    """The properties of a call that decide which back-ends can serve it.

    A tuple, because one is made and hashed on every call.
    """

    device: str
    dtype: torch.dtype
    needs_grad: bool = False
    contiguous: bool = True
    batch_invariant: bool = False
    formats: tuple[str, str] = ALL_PLAIN
    rounding: bool = False


def _cpu_reason() -> str | None:
    from . import cpu

    return cpu.unavailable_reason()


@functools.cache
def _load_cpu() -> Run:
    from .cpu import fused_experts_cpu

    return fused_experts_cpu


@functools.cache
def _load_quick_cpu() -> QuickRun:
    return torch.ops.moesd.try_experts.default


def _triton_reason() -> str | None:
    from .triton import unavailable_reason

    return unavailable_reason()


@functools.cache
def _load_triton() -> Run:
    from .triton.launch import fused_experts_triton

    return fused_experts_triton


def _cuda_reason() -> str | None:
    from . import cuda

    return cuda.unavailable_reason()


@functools.cache
def _load_cuda() -> Run:
    from .cuda import fused_experts_cuda

    return fused_experts_cuda


# In order of preference.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "triton",
            frozenset({"cuda"}),
            SINGLE,
            _triton_reason,
            _load_triton,
            formats=frozenset(NUMBERS),
        ),
        Backend(
            "cpu",
            frozenset({"cpu"}),
            SINGLE,
            _cpu_reason,
            _load_cpu,
            _load_quick_cpu,
            formats=EVERY_FORMAT,
            rounding=True,
        ),
        # Not automatic until it has been measured on a GPU.
        Backend(
            "cuda",
            frozenset({"cuda"}),
            frozenset({torch.bfloat16}),
            _cuda_reason,
            _load_cuda,
            automatic=False,
        ),
        Backend(
            "torch",
            None,
            ANY,
            lambda: None,
            lambda: fused_experts_torch,
            compiled=False,
            formats=EVERY_FORMAT,
            rounding=True,
        ),
        Backend(
            "reference",
            None,
            ANY,
            lambda: None,
            lambda: fused_experts_reference,
            automatic=False,
            compiled=False,
            invariant=False,
            formats=EVERY_FORMAT,
            rounding=True,
        ),
    )
}


def available_backends() -> dict[str, str | None]:
    """Every back-end of ``fused_experts``: its name, and None or why it cannot run here."""
    return {name: _unavailable(backend) for name, backend in BACKENDS.items()}


def _unavailable(backend: Backend) -> str | None:
    try:
        return backend.unavailable_reason()
    except ImportError as error:
        return f"it cannot be imported ({error})"


def _refusal(backend: Backend, traits: CallTraits) -> str | None:
    """Why ``backend`` cannot serve ``traits``, or None. Cheap reasons come first."""
    if backend.devices is not None and traits.device not in backend.devices:
        return f"it runs on {'/'.join(sorted(backend.devices))} tensors, got {traits.device}"
    if traits.dtype not in backend.dtypes:
        return f"it takes {_listed(map(str, backend.dtypes))}, got {traits.dtype}"
    if not backend.formats.issuperset(traits.formats):
        return f"it reads weights as {_listed(backend.formats)}, got {_stored(traits)}"
    if traits.rounding and not backend.rounding:
        return "it does not round activations to eight bits"
    if backend.compiled and traits.needs_grad:
        return "it has no backward pass, and an input requires gradients"
    if backend.compiled and not traits.contiguous:
        return "it reads contiguous weights, and these are not"
    if traits.batch_invariant and not backend.invariant:
        return "it does not support batch_invariant=True"
    return _unavailable(backend)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _stored(traits: CallTraits) -> str:
    """The weight format, or both."""
    return " and ".join(dict.fromkeys(traits.formats))


@functools.lru_cache(maxsize=256)
def choose_backend(name: str, traits: CallTraits) -> Backend:
    """The named back-end, or the fastest that can serve ``traits``.

    The answer is remembered: what a process can run does not change, and the choice is logged once.

    Raises:
        ValueError: unknown name.
        RuntimeError: the named back-end cannot serve ``traits``; the message says why.
    """
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {name!r}")
        refusal = _refusal(BACKENDS[name], traits)
        if refusal is not None:
            raise RuntimeError(f"backend {name!r} cannot run this call: {refusal}")
        return BACKENDS[name]
    refusals: list[str] = []
    for backend in BACKENDS.values():
        if not backend.automatic:
            continue
        refusal = _refusal(backend, traits)
        if refusal is None:
            _log_choice(backend.name, traits, refusals)
            return backend
        if backend.devices is None or traits.device in backend.devices:
            refusals.append(f"{backend.name}: {refusal}")
    raise RuntimeError(f"no backend can run this call: {'; '.join(refusals)}")


def _log_choice(name: str, traits: CallTraits, refusals: list[str]) -> None:
    because = f" ({'; '.join(refusals)})" if refusals else ""
    # Falling back from a compiled kernel costs much speed, so it is said louder.
    level = logging.WARNING if refusals and not traits.needs_grad else logging.INFO
    stored = "" if traits.formats == ALL_PLAIN else f" with {_stored(traits)} weights"
    on, dtype = traits.device, traits.dtype
    logger.log(level, "experts on %s in %s%s use backend %r%s", on, dtype, stored, name, because)
