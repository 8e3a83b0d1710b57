"""A chain in one graph drafts what its steps do one by one, whatever rows it is replayed for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.device.fake_graphs import FakeGraph, fake_graphs
from support.device.operations import OperationLog
from support.eagle_reference import LAYER, H, random_layer, save
from support.heads.mtp import save_with_heads
from support.scripted import Script
from support.tiny import VOCAB, random_prompts, tiny_model

from decoder import SamplingParams
from decoder.drafters.eagle import EagleDrafter
from decoder.drafters.independent import IndependentDrafter
from decoder.drafters.mtp import MtpDrafter
from decoder.drafters.ngram import HybridDrafter, NgramDrafter
from decoder.drafters.replay import ReplayDrafter
from decoder.drafters.self_draft import SelfDrafter
from decoder.drafters.suffix import SuffixDrafter
from decoder.model.runner import ModelRunner
from decoder.round import Draft, Verdict
from decoder.sampling import Sampler

torch.set_num_threads(1)

ROWS, LONGEST, CONTEXT = 5, 120, 64
SAMPLED = (
    SamplingParams(temperature=0.9, seed=3),
    SamplingParams(temperature=1.2, top_k=12, repetition_penalty=1.3, seed=4),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_p=0.8, min_p=0.02, logit_bias={3: 1.0}, seed=5),
)


def independent(folder: Path, **config: Any) -> IndependentDrafter:
    return IndependentDrafter(tiny_model("llama", seed=3, num_hidden_layers=1, **config))


def eagle(folder: Path) -> EagleDrafter:
    weights = {"fc.weight": 0.3 * torch.randn(H, 2 * H), **random_layer("layers.0", H, 2)}
    return EagleDrafter(save(folder, LAYER, weights))


def mtp(folder: Path) -> MtpDrafter:
    save_with_heads(folder, tiny_model("qwen3_moe"), "deepseek", 2)
    return MtpDrafter(folder)


DRAFTERS: dict[str, Callable[[Path], Any]] = {
    "independent": independent,
    "short context": lambda folder: independent(folder, max_position_embeddings=CONTEXT),
    "self": lambda _: SelfDrafter(1),
    "eagle": eagle,
    "mtp": mtp,
    "ngram": lambda _: NgramDrafter(3, 1),
    "hybrid": lambda folder: HybridDrafter(independent(folder), NgramDrafter(3, 1), 2),
    "replay": lambda _: ReplayDrafter(0.5, recordings()),
}


def text_of(row: int) -> list[int]:
    """What a row says by itself, with something to look up in it."""
    return random_prompts(1, seed=row, low=LONGEST // 4, high=LONGEST // 4)[0] * 4


def recordings() -> dict[tuple[int, ...], list[int]]:
    return {tuple(text_of(row)[:n]): text_of(row)[n:] for row, n in ((2, 5), (0, 9), (3, 21))}


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny_model("qwen3_moe")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    return fake_graphs(monkeypatch)


class Rows:
    """Rows that a drafter of their own drafts for: they come, go, and take what is drafted."""

    def __init__(
        self, target: Any, drafter: Any, params: tuple[SamplingParams, ...], static: bool
    ) -> None:
        self.drafter, self.params = drafter, params
        self.runner = ModelRunner(target, ROWS, LONGEST, attention="portable", static=static)
        self.sampler = Sampler(ROWS, VOCAB, "cpu")
        drafter.bind(self.runner, self.sampler, 6)
        self.script = Script(drafter, [], [], [], follow=True)
        self.script.history = torch.full((ROWS + 1, 200), 7)

    def admit(self, row: int, length: int) -> None:
        sequence = text_of(row)
        features = torch.randn(LONGEST, H, generator=torch.Generator().manual_seed(row))
        new = Script(self.drafter, [sequence], [row], [features])
        ids = torch.tensor([sequence[:length]])
        self.runner.prefill(torch.tensor([row]), ids, torch.tensor([length]))
        self.sampler.admit(row, self.params[row % len(self.params)], sequence[:length], ())
        new.admit([length])
        for name in ("rows", "sequences", "lengths", "features"):
            getattr(self.script, name).extend(getattr(new, name))

    def drop(self, place: int) -> None:
        row = self.script.rows[place]
        for name in ("rows", "sequences", "lengths", "features"):
            getattr(self.script, name).pop(place)
        self.drafter.release([row])
        self.sampler.release(row)

    def round(self, gamma: int, kept: int) -> Draft | None:
        """A round that keeps at most ``kept`` drafts, in the first row none."""
        before = self.script.state()
        accepted = [min(kept, gamma) * (place > 0) for place in range(len(before.host_rows))]
        draft = self.script.round(gamma, accepted)
        counts = torch.tensor(accepted) + 1
        tokens = torch.tensor(
            [
                sequence[n + 1 : n + 2 + gamma]
                for sequence, n in zip(self.script.sequences, before.host_lengths, strict=True)
            ]
        )
        self.sampler.commit(before.rows, tokens, counts, torch.full_like(counts, gamma))
        if draft is None:
            return None
        # A graph's next draft overwrites this one.
        probs = None if draft.probs is None else draft.probs.clone()
        return Draft(draft.tokens.clone(), probs, draft.lengths.clone())


def story(rows: Rows) -> list[Draft | None]:
    """Draft lengths change, rounds go without drafts, rows end, and others take their places."""
    drafts = []
    for row, length in ((2, 5), (0, 9), (3, 57)):
        rows.admit(row, length)
    for gamma, kept in ((3, 1), (3, 3), (0, 0), (0, 0), (3, 2), (2, 2), (3, 0)):
        drafts.append(rows.round(gamma, kept))
    rows.drop(1)
    drafts += [rows.round(3, 1), rows.round(3, 3)]
    rows.admit(0, 12)
    rows.admit(1, 3)
    drafts += [rows.round(3, kept) for kept in (1, 2, 0)]
    rows.drop(0)
    return [*drafts, rows.round(3, 3)]


@pytest.mark.parametrize("params", [(SamplingParams(),), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", DRAFTERS)
@torch.no_grad()
def test_chains_in_graphs_are_those_without(name, params, target, graphs, tmp_path):
    torch.manual_seed(0)
    by_operation = Rows(target, DRAFTERS[name](tmp_path), params, False)
    plain = story(by_operation)
    assert not graphs
    torch.manual_seed(0)
    in_graphs = Rows(target, DRAFTERS[name](tmp_path), params, True)
    captured = story(in_graphs)
    assert sum(graph.replays for graph in graphs) > len(graphs) > 0
    for got, want in zip(captured, plain, strict=True):
        assert (got is None) == (want is None)
        if got is None or want is None:
            continue
        assert got.lengths.tolist() == want.lengths.tolist()
        valid = torch.arange(want.gamma) < want.lengths[:, None]
        assert torch.equal(got.tokens[valid], want.tokens[valid])
        assert (got.probs is None) == (want.probs is None)
        assert (want.probs is None) == (len(params) == 1 or name in ("ngram", "replay"))
        if got.probs is not None and want.probs is not None:
            torch.testing.assert_close(got.probs[valid], want.probs[valid], rtol=1e-4, atol=1e-6)
    proposed = {int(n) for draft in plain if draft is not None for n in draft.lengths}
    assert {2, 3} <= proposed
    if name == "replay":
        for rows in (by_operation, in_graphs):
            rows.drop(2)
        assert in_graphs.drafter.recordings == by_operation.drafter.recordings
        assert len(in_graphs.drafter.recordings[tuple(text_of(1)[:3])]) > 4
    if name == "short context":
        assert 0 in proposed, "a row outgrows it"


@pytest.mark.parametrize("name", [*DRAFTERS, "suffix"])
@torch.no_grad()
def test_a_round_of_drafting_is_few_operations(name, target, graphs, tmp_path):
    """Views included; what a graph replays is its own."""
    drafter = SuffixDrafter() if name == "suffix" else DRAFTERS[name](tmp_path)
    rows = Rows(target, drafter, SAMPLED, True)
    for row, length in ((2, 5), (0, 9), (3, 21)):
        rows.admit(row, length)
    for _ in range(3):
        rows.round(4, 2)
    state = rows.script.state()
    verdict = Verdict(torch.zeros(3).long(), torch.zeros(3, 5).long(), [[0, -1, -1, -1, -1]] * 3)
    hidden = torch.zeros(3, 5, H)
    made = len(graphs)
    with OperationLog() as log:
        assert drafter.propose(state, 4).gamma == 4
        drafter.commit(state, verdict, hidden)
    assert len(log.names) <= 4 and "tolist" not in log.names, log.names
    assert len(graphs) == made
