"""Faults made to order: every call that a step of the decoder makes raises when it is told to."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.decoding import decoder
from support.tiny import LetterTokenizer, ragged_prompts

from decoder import Output, SamplingParams, SpeculativeDecoder
from decoder.engine import verification
from decoder.engine.metrics import DecoderStats
from decoder.requests.sequence import ActiveSequence

B = 4
STEPS = 60  # a run takes about ten

# Where: what owns the method in a decoder, and the method.
BATCH = {
    f"{owner}.{method}": (owner, method)
    for owner, methods in {
        "runner": ("prefill", "forward"),
        "drafter": ("admit", "propose", "commit", "release"),
        "sampler": ("distribution", "draw", "verify", "commit", "logprobs"),
        "_rounds.batch": ("take_rows", "write_prompts", "append", "advance", "remove"),
        "_rounds._clock": ("start", "mark", "stop"),
        "controller": ("choose", "observe", "admitted"),
        "DecoderStats": ("observe", "output_to_expect"),
        "verification": ("token_logprobs",),
    }.items()
    for method in methods
}
# The same, and which of its calls concern request b.
REQUEST: dict[str, tuple[str, str, Callable[..., int | None]]] = {
    "reader.read": ("reader", "read", lambda index, *_: index),
    "reader._check": ("reader", "_check", lambda params, stop, name: int(name.split()[1])),
    "sampler.admit": ("sampler", "admit", lambda row, params, *_: params.top_k - 90),
    "sampler.release": ("sampler", "release", lambda row: row),
    "sequence.extend": ("ActiveSequence", "extend", lambda self, *_: self.request.index),
    "sequence.output": ("ActiveSequence", "output", lambda self: self.request.index),
    "sequence.text": ("ActiveSequence", "_decode", lambda self, _: self.request.index),
    "stop string": ("ActiveSequence", "_stop_string", lambda self, *_: self.request.index),
    "tokenizer.call": ("tokenizer", "encode", lambda text: 3),
    "tokenizer.decode": ("tokenizer", "decode", lambda *_, **__: None),
}
READING = ("reader.read", "reader._check", "tokenizer.call")


class Fault(Exception):
    pass


class Tokenizer(LetterTokenizer):
    def __call__(self, text: str) -> dict[str, list[int]]:
        return self.encode(text)

    def encode(self, text: str) -> dict[str, list[int]]:
        return super().__call__(text)


def owner_of(engine: SpeculativeDecoder, path: str) -> Any:
    own = {"DecoderStats": DecoderStats, "ActiveSequence": ActiveSequence,
           "verification": verification}  # fmt: skip
    found: Any = engine
    for part in () if path in own else path.split("."):
        found = getattr(found, part)
    return own.get(path, found)


@contextmanager
def trap(
    engine: SpeculativeDecoder,
    point: str,
    concerns: Callable[..., bool],
    times: int,
    kind: type[BaseException] = Fault,
) -> Iterator[list[int]]:
    """Make the next ``times`` calls of ``point`` that ``concerns`` selects raise; counts them."""
    path, method, *_ = BATCH.get(point) or REQUEST[point]
    owner, fired = owner_of(engine, path), [0]
    original = getattr(owner, method)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if fired[0] < times and concerns(*args, **kwargs):
            fired[0] += 1
            raise kind("by the test")
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, failing)
        yield fired


def requests(sampled: bool) -> list[tuple[Any, SamplingParams]]:
    """Prompts that repeat themselves, one of them text; parameters that use every table."""
    prompts: list[Any] = [2 * p[-4:] + p[-4:-2] for p in ragged_prompts(3, seed=4)]
    extras: list[dict[str, Any]] = [
        {"logprobs": 1}, {"presence_penalty": 0.3, "frequency_penalty": 0.2},
        {}, {"logit_bias": {9: 1.0}, "min_new_tokens": 2},
    ]  # fmt: skip
    return [
        # A top-k above 90 keeps nearly all and tells a test whose parameters it sees.
        (prompt, SamplingParams(
            temperature=0.4 * sampled, seed=7 + b, top_k=90 + b, max_new_tokens=5,
            ignore_eos=True, stop="never", **extras[b],
        ))
        for b, prompt in enumerate([*prompts, "abcabcab"])
    ]  # fmt: skip


class Case:
    """A decoder, its reference outputs, and what it looked like before anything failed."""

    def __init__(
        self, target: Any, drafter: Any, sampled: bool, verifier: str = "standard"
    ) -> None:
        self.prompts, self.params = map(list, zip(*requests(sampled), strict=True))
        self.engine = decoder(
            target, drafter, 3, max_batch_size=3, max_length=60, verifier=verifier,
            tokenizer=Tokenizer(),
        )  # fmt: skip
        self.expected = self.outputs()
        assert all(output.error is None for output in self.expected)
        assert bool(self.engine.stats.drafted) == (drafter is not None)

    def outputs(self) -> list[Output]:
        steps, step = itertools.count(), self.engine.step

        def limited() -> Any:
            assert next(steps) < STEPS, "the decoder does not come to an end"
            return step()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.engine, "step", limited)
            found = list(self.engine.stream(self.prompts, self.params))
        return sorted(found, key=lambda output: output.index)

    def check_others(
        self,
        outputs: list[Output],
        lost: int | None,
        what: str,
        tokens: bool = True,
        drafted: bool = True,
    ) -> None:
        assert [output.index for output in outputs] == list(range(B)), what
        for b, (got, want) in enumerate(zip(outputs, self.expected, strict=True)):
            if got.error is not None:
                assert b == lost and got.finish_reason == "error", (what, got)
                assert f"prompt {b}: " in got.error and "by the test" in got.error, what
            elif tokens and b != lost:
                assert got.token_ids == want.token_ids, (what, b)
                assert got.text == want.text, (what, b)
                assert got.drafted == want.drafted or not drafted, (what, b)
                for ours, theirs in zip(got.logprobs or (), want.logprobs or (), strict=True):
                    assert ours.raw == pytest.approx(theirs.raw, abs=1e-9), (what, b)

    def check_clean(self, what: str) -> None:
        engine = self.engine
        batch, adjustments = engine._rounds.batch, engine.sampler._adjustments
        assert engine.is_idle() and engine.step() == [], what
        assert batch.free_rows == [0, 1, 2] and batch.sequences == [], what
        assert not engine.sampler._table.admitted and not adjustments.active, what
        synced = [getattr(engine.drafter, name, 0) for name in ("_synced", "_host_synced")]
        assert not any(any(rows) for rows in synced if isinstance(rows, list)), what


def nth(count: int) -> Callable[..., bool]:
    """Selects calls from the ``count``-th on."""
    calls = itertools.count()
    return lambda *_, **__: next(calls) >= count


def of_request(point: str, b: int) -> Callable[..., bool]:
    which = REQUEST[point][2]
    return lambda *args, **kwargs: which(*args, **kwargs) in (b, None)


def places(requests: Sequence[int]) -> Iterator[tuple[str, int, Callable[..., bool]]]:
    """Every point, and the calls of it that fail: early and late, or for each of ``requests``."""
    for point in BATCH:
        for count in (0, 3):
            yield point, count, nth(count)
    for point in REQUEST:
        for b in requests:
            yield point, b, of_request(point, b)


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
