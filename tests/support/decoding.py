"""Decoders on tiny models: their references, and a drafter that audits and poisons the cache."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from support.tiny import greedy_reference, perturbed, random_prompts, tiny_model
from torch import Tensor
from torch.overrides import TorchFunctionMode

from decoder import SpeculativeDecoder
from decoder.drafters import DraftOptions, build_drafter
from decoder.model.cache import cache_argument
from decoder.model.recurrent.states import RecurrentStates
from decoder.round import Draft, StepState

NEW_TOKENS = 17
MAX_LENGTH = 40


def decoder(target: Any, drafter: Any = None, gamma: Any = 3, **options: Any) -> SpeculativeDecoder:
    """A decoder of four rows on transformers' code alone."""
    options = {"max_batch_size": 4, "kernels": False, "attention": "portable"} | options
    made = build_drafter(drafter, target, options=DraftOptions(kernels=options["kernels"]))
    return SpeculativeDecoder(target, made, gamma, **options)


@functools.cache
def model_of(family: str, dtype: torch.dtype = torch.float64) -> Any:
    return tiny_model(family, dtype=dtype)


@functools.cache
def draft_of(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A draft model that often agrees with the target."""
    return perturbed(model_of(family, dtype))


PROMPTS = random_prompts(6, seed=11)


@functools.cache
def references(family: str, dtype: torch.dtype = torch.float64) -> list[list[int]]:
    model = model_of(family, dtype)
    return [greedy_reference(model, prompt, NEW_TOKENS) for prompt in PROMPTS]


def recordings(family: str) -> dict[tuple[int, ...], list[int]]:
    pairs = zip(PROMPTS, references(family), strict=True)
    return {tuple(prompt): output for prompt, output in pairs}


def decoder_of(
    family: str,
    drafter: Any,
    gamma: Any,
    batch: int = 3,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> SpeculativeDecoder:
    """A decoder on the family's model; three rows for six prompts, so rows are used again."""
    options = {"attention": "auto", "max_length": MAX_LENGTH, **options}
    return decoder(model_of(family, dtype), drafter, gamma, max_batch_size=batch, **options)


class DoubleOnly(TorchFunctionMode):
    """Turns every request for fp32 into fp64: transformers' norms, softmaxes and rotary tables
    round to fp32 even in an fp64 model, which would hide errors below 1e-6."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        swapped = (torch.float64 if a is torch.float32 else a for a in args)
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*swapped, **named)


class Audited:
    """Wraps a drafter: before each round, checks the target's cache and poisons what is stale.

    Every committed position must hold what a fresh prefill of the same tokens computes; every other
    position is overwritten with a large finite number, which must change nothing. (Not NaN: a
    masked position takes part as 0 * value.)
    """

    def __init__(self, drafter: Any, poison: float = 1e4) -> None:
        self.drafter, self.poison, self.worst, self.audits, self._rounds = (
            drafter, poison, 0.0, 0, 0,
        )  # fmt: skip
        self.name = drafter.name

    @property
    def hidden_layers(self) -> Any:
        return self.drafter.hidden_layers

    def bind(self, runner: Any, sampler: Any, max_gamma: int) -> None:
        self.runner = runner
        self.drafter.bind(runner, sampler, max_gamma)

    def admit(self, *args: Any) -> None:
        self.drafter.admit(*args)

    def propose(self, state: StepState, gamma: int) -> Draft:
        self._rounds += 1
        if self._rounds % 2:
            self._audit(state)
        self._poison(state)
        return self.drafter.propose(state, gamma)

    def commit(self, *args: Any) -> None:
        self.drafter.commit(*args)

    def release(self, rows: Any) -> None:
        self.drafter.release(rows)

    def _audit(self, state: StepState) -> None:
        for row, length in state.rows_and_lengths():
            fresh = transformers.DynamicCache()
            ids = state.tokens[row, :length][None]
            taken = {cache_argument(self.runner.model): fresh, "use_cache": True}
            self.runner.model(input_ids=ids, **taken)
            for ours, theirs in zip(self.runner.cache.layers, fresh.layers, strict=True):
                for slab, exact in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                    error = slab[row, :length] - exact[0].transpose(0, 1)
                    self.worst = max(self.worst, float(error.abs().max()))
            self.audits += 1

    def _poison(self, state: StepState) -> None:
        lengths = dict(state.rows_and_lengths())
        for layer in self.runner.cache.layers:
            for row in range(layer.keys.shape[0]):
                start = lengths.get(row, 0)
                sign: Tensor = torch.ones_like(layer.keys[row, start:])
                sign[::2] = -1
                layer.keys[row, start:] = self.poison * sign
                layer.values[row, start:] = self.poison


def poison_states(states: RecurrentStates, lengths: dict[int, int]) -> None:
    """NaN at all places of rings but those that rows of these lengths go on from.

    States of other rows are NaN, too.
    """
    for layer in states.layers.values():
        window, width = layer._window, layer._window.length - layer._undecided
        rings = [(window, {row: max(n - width, 0) for row, n in lengths.items()})]
        for recurrence in layer.recurrences:
            free = [row for row in range(len(recurrence.states)) if row not in lengths]
            recurrence.states[free] = torch.nan
            first = {row: int(recurrence.progress[0, row]) for row in lengths}
            rings += [(ring, first) for ring in recurrence.rings]
        for ring, first in rings:
            kept = {
                row * ring.length + p % ring.length
                for row, n in lengths.items()
                for p in range(first[row], n)
            }
            ring.slab[[i for i in range(len(ring.slab)) if i not in kept]] = torch.nan
