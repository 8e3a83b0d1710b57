"""Heads of every published layout draft what their equations say, and change no output."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from support.heads.mtp import PUBLISHED, ReferenceHead, reference_draft, save_published
from support.scripted import GammaSchedule, GreedySampler, Script
from support.tiny import VOCAB, greedy_reference, random_prompts

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters.mtp import MtpDrafter
from decoder.model.loading import load_model

torch.set_num_threads(1)

NEW = 11
PROMPTS = random_prompts(5, seed=4)


class Checkpoint(NamedTuple):
    path: Path
    target: Any
    heads: list[ReferenceHead]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Checkpoint]:
    """fp64, so that no product depends on how many rows it is of."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        (name, count): Checkpoint(
            path := root / f"{name}-{count}", *save_published(path, name, count)
        )
        for name in PUBLISHED
        for count in (1, 3)
    }


@torch.no_grad()
def start(checkpoint: Checkpoint, rows: int, **options: Any) -> Script:
    """A drafter on a runner that has all it asks for, whether or not there is one for its model."""
    target = checkpoint.target
    runner: Any = SimpleNamespace(
        model=target, config=target.config, max_batch_size=4, max_length=200, static=False,
        dtype=target.dtype, device=torch.device("cpu"), graphs=None, attention_op=None,
    )  # fmt: skip
    drafter = MtpDrafter(checkpoint.path, **options)
    drafter.bind(runner, GreedySampler(VOCAB), 6)  # type: ignore[arg-type]
    sequences = random_prompts(rows, seed=5, low=120, high=120)
    ids = torch.tensor(sequences)
    features = list(target.base_model(ids, use_cache=False).last_hidden_state)
    script = Script(drafter, sequences, [2, 0, 3, 1][:rows], features)
    script.admit([1, 9, 4, 2][:rows])
    return script


def check_round(script: Script, checkpoint: Checkpoint, gamma: int, accepted: list[int]) -> None:
    starts, features = list(script.lengths), script.features
    draft = script.round(gamma, accepted)
    if draft is None:
        return
    assert features is not None
    for row, length in enumerate(starts):
        tokens = script.sequences[row][: length + 1]
        expected = reference_draft(checkpoint.heads, tokens, features[row][:length], gamma)
        assert draft.tokens[row].tolist() == expected, (row, length)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", PUBLISHED)
def test_drafts_what_the_equations_say(name: str, count: int, checkpoints: Any) -> None:
    checkpoint = checkpoints[name, count]
    script = start(checkpoint, 4)
    generator = torch.Generator().manual_seed(1)
    for gamma in (3, 1, 0, 0, 4, 6, 2):
        accepted = torch.randint(0, gamma + 1, (4,), generator=generator).tolist()
        check_round(script, checkpoint, gamma, accepted)


def test_backlog_longer_than_the_ring(checkpoints: Any) -> None:
    checkpoint = checkpoints["mimo", 3]
    script = start(checkpoint, 2)
    check_round(script, checkpoint, 3, [3, 0])
    for _ in range(45):
        check_round(script, checkpoint, 0, [0, 0])
    check_round(script, checkpoint, 6, [2, 6])
    check_round(script, checkpoint, 2, [0, 0])


def test_a_row_forgets_the_old_sequence(checkpoints: Any) -> None:
    checkpoint = checkpoints["deepseek_v3", 3]
    script = start(checkpoint, 2)
    check_round(script, checkpoint, 4, [4, 1])
    script.drafter.release(script.rows)
    script.admit([3, 1])
    check_round(script, checkpoint, 4, [0, 2])
    check_round(script, checkpoint, 4, [0, 0])


@pytest.mark.parametrize(("name", "count"), [*((name, 1) for name in PUBLISHED), ("mimo", 3)])
def test_greedy_output_is_the_targets_own(name: str, count: int, checkpoints: Any) -> None:
    path, target, _ = checkpoints[name, count]
    model = load_model(path, device="cpu", experts="eager")
    expected = [greedy_reference(target, prompt, NEW) for prompt in PROMPTS]
    for batch in (1, 4):  # fewer rows than prompts: they are used again
        decoder = SpeculativeDecoder(
            *(model, MtpDrafter(), GammaSchedule([1, 4, 2, 0, 3])),
            max_batch_size=batch, max_length=64, kernels=False,
        )  # fmt: skip
        outputs = decoder.generate(PROMPTS, SamplingParams(max_new_tokens=NEW))
        assert [output.token_ids for output in outputs] == expected
        assert decoder.stats.alpha is not None


def test_heads_run_on_the_kernels_and_change_nothing(checkpoints: Any) -> None:
    model = load_model(checkpoints["deepseek_v3", 3].path, dtype="fp32", device="cpu")
    outputs = []
    for drafter, gamma in ((None, 0), (MtpDrafter(kernels=True), 4)):
        decoder = SpeculativeDecoder(model, drafter, gamma, max_batch_size=3, max_length=64)
        made = decoder.generate(PROMPTS, SamplingParams(max_new_tokens=NEW))
        outputs.append([output.token_ids for output in made])
    assert outputs[0] == outputs[1]
    assert isinstance(drafter, MtpDrafter) and len(drafter.heads) == 3
    for head in drafter.heads:
        assert head.base.config._experts_implementation == "moesd"
        assert "forward" in vars(head.around["projection"]), "not its own any more"
