"""Calls of the operators of recurrent layers, and the bound that their results are held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from support.oracle import assert_as_accurate
from torch import Tensor

from moesd_kernels.dense.recurrent import delta_rule, mamba, mamba2

REFERENCES = {
    "gated_delta_rule": delta_rule.gated_delta_rule,
    "selective_state_update": mamba2.selective_state_update,
    "selective_scan": mamba.selective_scan,
}
# B, Q, then the sizes. Small ones; one channel and one of everything; what fills no vector and no
# block of columns; what does.
DELTA_SIZES = [
    (3, 4, 2, 4, 16, 24),
    (1, 1, 1, 1, 1, 1),
    (2, 3, 1, 3, 130, 70),
    (2, 2, 2, 2, 64, 128),
]
MAMBA2_SIZES = [
    (3, 4, 4, 2, 6, 16),
    (1, 1, 1, 1, 1, 1),
    (2, 3, 3, 1, 37, 130),
    (2, 2, 4, 2, 64, 64),
]
MAMBA_SIZES = [(3, 4, 40, 16), (1, 1, 1, 1), (2, 3, 33, 37), (2, 2, 64, 16)]


class Call(NamedTuple):
    """Arguments of one call.

    Attributes:
        name: of the operator.
        inputs: what comes before the states, tokens first ``[B, Q, ...]``.
        states: ``[R, ...]`` fp32.
        ragged: rows, keep and counts ``[B]`` each.
    """

    name: str
    inputs: tuple[Tensor, ...]
    states: Tensor
    ragged: tuple[Tensor, Tensor, Tensor]

    def run(self, function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """Output and states afterwards; those of the call stay as they are."""
        states = self.states.clone()
        return function(*self.inputs, states, *self.ragged), states

    def double(self) -> Call:
        """The same call in fp64."""
        return self._replace(
            inputs=tuple(tensor.double() for tensor in self.inputs), states=self.states.double()
        )

    def to(self, device: str) -> Call:
        """The same call on a device."""
        inputs, ragged = (tuple(t.to(device) for t in ts) for ts in (self.inputs, self.ragged))
        return self._replace(inputs=inputs, states=self.states.to(device), ragged=ragged)

    def tokens(self, b: int, start: int, stop: int, keep: int) -> Call:
        """Some tokens of one sequence alone, of which the first ``keep`` are accepted."""
        part = lambda t: t[b : b + 1, start:stop] if t.dim() > 2 else t  # [B, Q, ...] or weights
        ragged = self.ragged[0][b : b + 1], torch.tensor([keep]), torch.tensor([stop - start])
        return self._replace(inputs=tuple(map(part, self.inputs)), ragged=ragged)

    def check(self, function: Callable[..., Tensor]) -> None:
        """Hold the outputs and the states of one function to twice the reference's error."""
        reference = REFERENCES[self.name]
        exact, baseline = self.double().run(reference), self.run(reference)
        for name, *results in zip(
            ("out", "states"), self.run(function), baseline, exact, strict=True
        ):
            assert_as_accurate(*results, name=f"{self.name} {name}")


def ragged_of(B: int, Q: int, R: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, keep and counts of B sequences, the first of which takes all Q tokens."""
    counts = torch.randint(0, Q + 1, (B,), generator=g)
    counts[0] = Q
    keep = (torch.rand(B, generator=g) * (counts + 1)).long()
    return torch.randperm(R, generator=g)[:B], keep, counts


def delta_call(B, Q, Hk, Hv, Dk, Dv, dtype, *, per_channel=False, seed=0) -> Call:
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=g)
    query, key, value = randn(B, Q, Hk, Dk), randn(B, Q, Hk, Dk), randn(B, Q, Hv, Dv)
    decay = -torch.rand(B, Q, Hv, *([Dk] if per_channel else []), generator=g)
    beta = torch.rand(B, Q, Hv, generator=g).to(dtype)
    inputs = (*(tensor.to(dtype) for tensor in (query, key, value)), decay, beta)
    return Call("gated_delta_rule", inputs, randn(B + 2, Hv, Dk, Dv), ragged_of(B, Q, B + 2, g))


def mamba2_call(B, Q, Hh, G, P, N, dtype, seed=0) -> Call:
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=g)
    x, to_state, from_state = (
        tensor.to(dtype) for tensor in (randn(B, Q, Hh, P), randn(B, Q, G, N), randn(B, Q, G, N))
    )
    dt, A = torch.rand(B, Q, Hh, generator=g), -torch.rand(Hh, generator=g)
    inputs = x, dt, A, to_state, from_state, randn(Hh).to(dtype)
    return Call("selective_state_update", inputs, randn(B + 2, Hh, P, N), ragged_of(B, Q, B + 2, g))


def mamba_call(B, Q, channels, N, dtype, seed=0) -> Call:
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=g)
    x, to_state, from_state = (
        tensor.to(dtype) for tensor in (randn(B, Q, channels), randn(B, Q, N), randn(B, Q, N))
    )
    dt, A = torch.rand(B, Q, channels, generator=g), -torch.rand(channels, N, generator=g)
    inputs = x, dt, A, to_state, from_state, randn(channels).to(dtype)
    return Call("selective_scan", inputs, randn(B + 2, channels, N), ragged_of(B, Q, B + 2, g))


def all_calls(dtype: torch.dtype) -> list[Call]:
    """One of each operator and each of its sizes."""
    return [
        *(delta_call(*sizes, dtype) for sizes in DELTA_SIZES),
        *(delta_call(*sizes, dtype, per_channel=True) for sizes in DELTA_SIZES),
        *(mamba2_call(*sizes, dtype) for sizes in MAMBA2_SIZES),
        *(mamba_call(*sizes, dtype) for sizes in MAMBA_SIZES),
    ]


# B, Q, channels, taps: of each way to read weights, with a rest of channels and without.
CONVOLUTIONS = [(2, 3, 130, 4), (1, 1, 64, 4), (3, 2, 70, 3), (2, 5, 7, 1), (1, 2, 3, 32)]


def convolution_call(B, Q, channels, taps, dtype, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """Window, weight and bias of one ``short_convolution``."""
    g = torch.Generator().manual_seed(seed)
    shapes = (B, taps - 1 + Q, channels), (channels, taps), (channels,)
    return tuple(torch.randn(shape, generator=g).to(dtype) for shape in shapes)
