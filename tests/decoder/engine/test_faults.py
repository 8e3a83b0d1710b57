"""Whatever raises in a step, wherever and whenever: nothing is lost but the request concerned.

Every call that a step makes is made to fail once, then always for one request, then by an
interrupt; the other outputs stay what they are, and the decoder can be used again at once.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.eagle_reference import LAYER, H, random_layer, save
from support.faults import BATCH, READING, REQUEST, B, Case, nth, of_request, places, tensors, trap
from support.tiny import perturbed, tiny_moe

from decoder.drafters import NgramDrafter
from decoder.drafters.eagle import EagleDrafter
from decoder.errors import RequestFailed

torch.set_num_threads(1)

TARGET = tiny_moe()
DRAFTERS: dict[str, Any] = {
    "none": None, "ngram": NgramDrafter(3, 1), "suffix": "suffix", "self": "self",
    "model": perturbed(TARGET, 3, 0.05),
}  # fmt: skip


@functools.cache
def case_of(drafter: str, sampled: bool, verifier: str = "standard") -> Case:
    return Case(TARGET, DRAFTERS[drafter], sampled, verifier)


@pytest.mark.parametrize(
    ("drafter", "sampled"),
    [
        ("none", False),
        ("ngram", True),
        ("suffix", True),
        ("self", False),
        ("model", False),
        ("model", True),
    ],
)
def test_what_fails_once_is_tried_again(drafter: str, sampled: bool) -> None:
    case = case_of(drafter, sampled)
    before, fired_at = tensors(), set()
    for point, at, concerns in places(range(B) if drafter == "model" else (1, 3)):
        what = f"{point} at {at}"
        with trap(case.engine, point, concerns, 1) as fired:
            outputs = case.outputs()
        if fired[0]:
            fired_at.add(point)
        # A request that could not be read has had its one chance; nothing else loses any.
        case.check_others(outputs, at if point in READING else None, what)
        case.check_clean(what)
    assert tensors() <= before
    case.check_others(case.outputs(), None, "afterwards")
    unused = {"drafter.propose", "sampler.verify"} if drafter == "none" else set()
    assert fired_at == (BATCH.keys() | REQUEST.keys()) - unused


@pytest.mark.parametrize("point", ["drafter.propose", "drafter.commit", "sampler.distribution"])
def test_a_head_drafts_again_from_where_it_was(tmp_path: Path, point: str) -> None:
    """Its features wait in a ring: what had been read on the way is read again."""
    weights = {"fc.weight": torch.randn(H, 2 * H), **random_layer("layers.0", H, 2)}
    case = Case(TARGET, EagleDrafter(save(tmp_path, LAYER, weights)), True)
    for at in range(6):
        with trap(case.engine, point, nth(at), 1) as fired:
            outputs = case.outputs()
        assert fired[0]
        case.check_others(outputs, None, f"{point} at {at}")
        case.check_clean(point)


# Whose second failure costs no request.
OPTIONAL = ("drafter.", "controller.", "DecoderStats.", "_rounds._clock", "sampler.release")
# What concerns request b in a call for several: its row is among those of the call.
LASTING = {
    "runner.forward": lambda ids, rows, *_, **__: rows.tolist(),
    "sampler.distribution": lambda logits, rows, *_: rows.tolist(),
    "sampler.verify": lambda target, draft, rows, _: rows.tolist(),
    "drafter.propose": lambda state, _: state.host_rows,
    "drafter.commit": lambda state, *_: state.host_rows,
}


@pytest.mark.parametrize("verifier", ["standard", "coupled"])
def test_what_fails_always_costs_the_request_concerned(verifier: str) -> None:
    case = case_of("model", True, verifier)

    def lives_in(rows: list[int], b: int) -> bool:
        live = case.engine._rounds.batch.sequences
        return any(s.request.index == b and s.row in rows for s in live)

    for point, b in itertools.product((*LASTING, *REQUEST), (0, 3)):
        if point in ("tokenizer.decode", "sequence.output", "sampler.release"):
            continue  # not one request's alone, or without a way on if it never works
        concerns = of_request(point, b) if point in REQUEST else (
            lambda *args, rows=LASTING[point], b=b, **kwargs: lives_in(rows(*args, **kwargs), b)
        )  # fmt: skip
        with trap(case.engine, point, concerns, 10**9) as fired:
            outputs = case.outputs()
        what = f"{point} for {b}"
        assert fired[0] or (point, b) == ("tokenizer.call", 0), what
        # Without drafts the law is the same, and under the coupled verifier the tokens are.
        drafts = point not in ("drafter.propose", "sampler.distribution")
        case.check_others(outputs, b, what, drafts or verifier == "coupled", drafts)
        lost = [output.index for output in outputs if output.error is not None]
        optional = point.startswith(OPTIONAL) or point == "sampler.verify" or not fired[0]
        assert lost == ([] if optional else [b]), (what, outputs)
        case.check_clean(what)
    case.check_others(case.outputs(), None, "afterwards")


def test_an_interrupt_leaves_an_idle_decoder() -> None:
    case = case_of("model", False)
    before = tensors()
    for point, at, concerns in places((0, 3)):
        what = f"{point} at {at}"
        with trap(case.engine, point, concerns, 1, KeyboardInterrupt) as fired:
            try:
                case.outputs()
            except KeyboardInterrupt:
                assert fired[0], what
            else:
                assert not fired[0], what
        case.check_clean(what)
    assert tensors() <= before
    case.check_others(case.outputs(), None, "afterwards")


def test_when_nothing_works_every_request_says_so() -> None:
    case = case_of("model", False)
    for point in ("runner.forward", "sampler.commit", "_rounds.batch.advance"):
        said = pytest.raises(RequestFailed, match=r"4 of 4 requests failed: prompt 0: .*by the")
        with trap(case.engine, point, lambda *_, **__: True, 10**9), said:
            case.engine.generate(case.prompts, case.params)
        case.check_clean(point)
    request = case.engine.add(case.prompts[0], case.params[0])
    with trap(case.engine, "sequence.extend", lambda *_: True, 10**9):
        (progress,) = case.engine.step()
    assert progress.request is request and progress.output.finish_reason == "error"
    assert progress.output.seed is None and case.engine.is_idle()
    case.check_others(case.outputs(), None, "afterwards")
