"""What stands for the functions that transformers' recurrent layers call, one for each kind.

These layers differ in their projections, gates and norms, which stay theirs. What all of them do
with a cache goes through a few functions of their modelling file. In a forward over ragged rows
those find the rows' own states here, outside of one they are transformers' own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .rows import rows_apart
from .states import RecurrentStates, active

_MARK = "_moesd_ragged"


def convolution(
    states: RecurrentStates,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """Inputs and outputs ``[B, C, Q]``, weight ``[C, W]``."""
    layer, placing = states.layer()
    inputs = hidden_states.transpose(1, 2)
    window = layer.window(inputs.to(weight.dtype), weight.shape[1], placing)
    out = states.operators.short_convolution(window, weight, bias, activation)
    return out.to(inputs.dtype).transpose(1, 2)


def delta_rule(
    states: RecurrentStates,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[B, Q, Hk, Dk]``, values ``[B, Q, Hv, Dv]``; there is no state to tell."""
    if not use_qk_l2norm_in_kernel:
        raise NotImplementedError("a delta rule whose keys are not normalised")
    rule = states.operators.gated_delta_rule

    def operator(inputs: list[Tensor], *ragged: Tensor) -> Tensor:
        return rule(*inputs, *ragged)

    shape = (value.shape[2], key.shape[3], value.shape[3])
    out = _recur(states, operator, [query, key, value, g, beta], shape)
    return out, out.new_empty(0)


def mamba2(
    states: RecurrentStates,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Inputs ``[B, Q, Hh, P]``, steps ``[B, Q, Hh]``, B and C ``[B, Q, G, N]``."""
    dt = _steps(dt, dt_bias, dt_softplus).clamp(*dt_limit)
    skip = torch.zeros_like(A) if D is None else D
    update = states.operators.selective_state_update

    def operator(inputs: list[Tensor], *ragged: Tensor) -> Tensor:
        x, steps, to_state, from_state = inputs
        return update(x, steps, A, to_state, from_state, skip, *ragged)

    shape = (*hidden_states.shape[2:], B.shape[3])
    out = _recur(states, operator, [hidden_states, dt, B, C], shape)
    return (out, out.new_empty(0)) if return_final_states else out


def mamba(
    states: RecurrentStates,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Inputs, steps and gate ``[B, channels, Q]``, B and C ``[B, N, Q]``."""
    x, dt, B, C = (part.transpose(1, 2) for part in (hidden_states, dt, B, C))
    dt = _steps(dt, delta_bias, delta_softplus)
    skip = torch.zeros_like(A[:, 0]) if D is None else D
    scan = states.operators.selective_scan

    def operator(inputs: list[Tensor], *ragged: Tensor) -> Tensor:
        x, steps, to_state, from_state = inputs
        return scan(x, steps, A, to_state, from_state, skip, *ragged)

    out = _recur(states, operator, [x, dt, B, C], tuple(A.shape)).transpose(1, 2)
    if z is not None:
        out = out * functional.silu(rows_apart(z.mT)).mT
    return (out, out.new_empty(0)) if return_last_state else out


# By the names that transformers' modelling files have for them. Those for one token with a state
# are not called: a ragged cache has no state to show.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": convolution,
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": delta_rule,
    "mamba2_chunk_scan": mamba2,
    "mamba_selective_scan": mamba,
}


def adapt(model: nn.Module) -> list[str]:
    """Let the modelling files of a model's modules find states where there are any.

    Returns:
        The names of what they call, of ``FUNCTIONS``.
    """
    found = set()
    for name in {type(module).__module__ for module in model.modules()}:
        namespace = vars(sys.modules[name]) if name in sys.modules else {}
        called = [function for function in FUNCTIONS if function in namespace]
        for function in called:
            if not hasattr(namespace[function], _MARK):
                namespace[function] = _found_by_thread(namespace[function], FUNCTIONS[function])
        if called and namespace.get("F") is functional:
            namespace["F"] = _functional()
        found.update(called)
    return sorted(found)


def _found_by_thread(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """``ours`` in a forward of this thread over ragged rows, else ``original``."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # which could not read a thread's variables
            return original(*args, **kwargs)
        states = active()
        return original(*args, **kwargs) if states is None else ours(states, *args, **kwargs)

    setattr(call, _MARK, True)
    return call


@functools.cache
def _functional() -> ModuleType:
    """``torch.nn.functional`` with a softplus, of which gates are made, that takes rows apart."""

    def softplus(states: RecurrentStates, x: Tensor, *arguments: Any) -> Tensor:
        return functional.softplus(rows_apart(x), *arguments)

    module = ModuleType(functional.__name__)
    vars(module).update(vars(functional), softplus=_found_by_thread(functional.softplus, softplus))
    return module


def _recur(
    states: RecurrentStates, operator: Any, inputs: list[Tensor], shape: tuple[int, ...]
) -> Tensor:
    layer, placing = states.layer()
    return layer.recur(operator, inputs, shape, placing)


def _steps(dt: Tensor, bias: Tensor | None, positive: bool) -> Tensor:
    """Widths of time steps ``[..., heads]`` from what a layer projects."""
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    return functional.softplus(rows_apart(dt)) if positive else dt
