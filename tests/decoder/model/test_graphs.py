"""Static-shape steps: padded buckets give what the plain path gives, and so do replays of them."""

import pytest
import torch
from support.device.fake_graphs import fake_graphs
from support.tiny import MOE_VOCAB, ragged_prompts, tiny_moe

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import DraftOptions, build_drafter
from decoder.errors import RequestFailed
from decoder.model.capture import CapturedCalls
from decoder.model.graphs import StepGraphs
from decoder.model.runner import ModelRunner

torch.set_num_threads(1)

BATCH, SPARE = 4, 9


def test_buckets_cover_every_batch_and_length():
    graphs = StepGraphs(20, 704, capture=False)
    assert [graphs.bucket(n) for n in (1, 2, 3, 5, 8, 9, 16, 17, 20)] == [
        1, 2, 4, 8, 8, 16, 16, 20, 20,
    ]  # fmt: skip
    assert [graphs.view(n) for n in (1, 256, 257, 513, 700)] == [256, 256, 512, 704, 704]


def test_static_forward_equals_plain_and_padding_touches_nothing():
    model = tiny_moe()
    plain = ModelRunner(model, 6, 40, attention="portable", static=False)
    static = ModelRunner(model, 6, 40, attention="portable", static=True)
    prompts = ragged_prompts(5, seed=6)
    width = max(map(len, prompts))
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts])
    lengths, rows = torch.tensor([len(p) for p in prompts]), torch.tensor([5, 0, 3, 1, 4])
    for runner in (plain, static):
        runner.prefill(rows, ids, lengths)
    # A large batch, then a smaller one: its padding rows held live rows a moment ago.
    for part in (slice(0, 5), slice(1, 4)):
        tokens = torch.randint(1, MOE_VOCAB, (len(lengths[part]), 3))
        positions = lengths[part, None] + torch.arange(3)
        options = {"hidden_layers": (0, 2), "max_position": 20}
        expected = plain.forward(tokens, rows[part], positions, **options)
        actual = static.forward(tokens, rows[part], positions, **options)
        torch.testing.assert_close(actual.logits, expected.logits)
        torch.testing.assert_close(actual.hidden, expected.hidden)
    for a, b in zip(plain.cache.ragged_layers, static.cache.ragged_layers, strict=True):
        torch.testing.assert_close(a.keys[:, :40], b.keys[:, :40])


def test_one_entry_per_bucket_and_width():
    runner = ModelRunner(tiny_moe(), 8, 40, attention="portable", static=True)
    runner.prefill(torch.arange(8), torch.full((8, 2), 7), torch.full((8,), 2))
    before = len(runner._graphs)
    for batch in (5, 6, 7, 8):
        for queries in (1, 3):
            positions = torch.full((batch, queries), 2) + torch.arange(queries)
            runner.forward(torch.full_like(positions, 7), torch.arange(batch), positions)
    assert len(runner._graphs) == before + 2


@pytest.mark.parametrize("drafter", ["self", "independent"])
def test_decoding_through_static_buffers(drafter):
    target, prompts = tiny_moe(), ragged_prompts(7)
    params = SamplingParams(max_new_tokens=10)
    options = {"kernels": False, "attention": "portable", "max_batch_size": 3}
    expected = SpeculativeDecoder(target, None, **options).generate(prompts, params)
    draft = tiny_moe(seed=1, layers=1) if drafter == "independent" else drafter
    made = build_drafter(draft, target, options=DraftOptions(kernels=False))
    engine = SpeculativeDecoder(target, made, 3, static=True, max_length=60, **options)
    outputs = engine.generate(prompts, params)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]


class Counters:
    """Counts by row, written by a call that would count wrongly if it ran once more."""

    def __init__(self) -> None:
        self.table = torch.zeros(SPARE + 1, dtype=torch.int64)
        self.runs: list[int] = []

    def __call__(self, rows: torch.Tensor, amounts: torch.Tensor) -> list[torch.Tensor]:
        self.runs.append(len(rows))
        self.table.index_add_(0, rows, amounts)
        return [self.table[rows], amounts[:, None] * 2.0]


def call(calls: CapturedCalls, counters: Counters, rows: list[int], amounts: list[int]):
    inputs = [torch.tensor(rows), torch.tensor(amounts)]
    return calls("count", counters, inputs, BATCH, [SPARE, 1])


@pytest.mark.parametrize("captured", [False, True])
def test_a_call_changes_the_rows_it_is_given_and_no_others(monkeypatch, captured):
    graphs = fake_graphs(monkeypatch) if captured else []
    calls, counters = CapturedCalls(captured), Counters()
    for rows in ([0, 2, 5], [1], [2, 5, 0, 3], [0, 5]):
        now = counters.table.clone()
        counts, doubled = call(calls, counters, rows, [10 * (row + 1) for row in rows])
        now[rows] += 10 * (torch.tensor(rows) + 1)
        assert torch.equal(counters.table[:SPARE], now[:SPARE]), "capturing counts as padding"
        assert torch.equal(counts, now[rows])
        assert torch.equal(doubled[:, 0], 20.0 * (torch.tensor(rows) + 1))
    assert len(calls) == 1 and set(counters.runs) == {BATCH}
    assert [graph.replays for graph in graphs] == ([4] if captured else [])
    assert len(counters.runs) == (3 if captured else 4), "a replay runs no Python"


def test_results_stay_until_the_next_call_of_their_key(monkeypatch):
    fake_graphs(monkeypatch)
    calls, counters = CapturedCalls(True), Counters()
    counts, _ = call(calls, counters, [0, 1], [1, 2])
    other = calls("other", lambda x: [x + x.sum(0)], [counts], 2, [0])[0]
    assert counts.tolist() == [1, 2] and other.tolist() == [4, 5], "not the other's memory"
    again, _ = call(calls, counters, [1], [5])
    assert again.tolist() == [7] and counts[0] == 7


def test_the_least_recently_used_are_dropped_and_clear_drops_all(monkeypatch):
    monkeypatch.setattr("decoder.model.capture.MAX_ENTRIES", 2)
    graphs = fake_graphs(monkeypatch)
    calls, captured = CapturedCalls(True), []
    for width in (1, 2, 1, 3, 1, 2):
        x = torch.full((1, width), width)
        assert torch.equal(calls("one more", lambda x: [x + 1], [x], 1, [0])[0], x + 1)
        captured.append(len(graphs))
    assert captured == [1, 2, 2, 3, 3, 4], "2 was used least recently, then again"
    assert len(calls) == 2
    calls.clear()
    assert len(calls) == 0
    calls("one more", lambda x: [x + 1], [x], 1, [0])
    assert len(graphs) == 5


def test_a_call_that_cannot_be_captured_changes_nothing(monkeypatch):
    fake_graphs(monkeypatch)
    calls, counters = CapturedCalls(True), Counters()

    def waits(rows: torch.Tensor, amounts: torch.Tensor) -> list[torch.Tensor]:
        counters(rows, amounts)
        return [rows * int(amounts.sum())]

    def lists(rows: torch.Tensor, amounts: torch.Tensor) -> list[torch.Tensor]:
        return [rows + torch.tensor(rows.tolist())]

    for function in (waits, lists):
        with pytest.raises(RuntimeError, match="synchronizing operation") as caught:
            calls("count", function, [torch.tensor([0]), torch.tensor([1])], BATCH, [SPARE, 0])
        assert "static=False" in caught.value.__notes__[0]
    assert len(calls) == 0 and counters.table[:SPARE].sum() == 0
    assert call(calls, counters, [3], [4])[0].tolist() == [4]


def test_where_graphs_are_not_insisted_on_what_waits_runs_without(monkeypatch, caplog):
    graphs, calls = fake_graphs(monkeypatch), CapturedCalls(True, insist=False)
    x = torch.tensor([[3]])
    calls("one more", lambda x: [x + 1], [x], 2, [0])

    def waits(x: torch.Tensor) -> list[torch.Tensor]:
        return [x + int(x.max())]

    for key in ("waits", "waits", "again"):
        assert calls(key, waits, [x], 2, [0])[0].tolist() == [[6]]
    assert calls("one more", lambda x: [x + 1], [x + 1], 2, [0])[0].tolist() == [[5]]
    assert [graph.replays for graph in graphs] == [2], "what is captured is replayed"
    said = [record.getMessage() for record in caplog.records if "CUDA graphs" in record.message]
    assert len(said) == 1 and "synchronizing" in said[0]


def test_a_model_that_waits_for_the_device_decodes_without_graphs(monkeypatch):
    """transformers' eager experts look at their tokens."""
    options = {"max_batch_size": 3, "max_length": 60, "kernels": False, "attention": "portable"}
    prompts, params = ragged_prompts(4), SamplingParams(max_new_tokens=6)
    target = tiny_moe()
    target.set_experts_implementation("eager")
    expected = SpeculativeDecoder(target, None, **options).generate(prompts, params)
    fake_graphs(monkeypatch)
    decoder = SpeculativeDecoder(target, None, static=True, **options)
    with pytest.raises(RequestFailed, match="static=False"):
        decoder.generate(prompts, params)
    decoder.runner._graphs._calls._insist = False  # as "auto" has it on a GPU
    outputs = decoder.generate(prompts, params)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]


def test_a_replayed_forward_is_the_plain_one(monkeypatch):
    options = {"max_batch_size": 3, "max_length": 40, "attention": "portable"}
    plain = ModelRunner(tiny_moe(), **options, static=False)
    graphs = fake_graphs(monkeypatch)
    replayed = ModelRunner(tiny_moe(), **options, static=True)
    rows, lengths = torch.tensor([2, 0, 1]), torch.tensor([3, 5, 2])
    prompts = torch.randint(1, MOE_VOCAB, (3, 5))
    for runner in (plain, replayed):
        runner.prefill(rows, prompts, lengths)
    before = len(graphs)
    for part in (slice(0, 3), slice(0, 3), slice(1, 3), slice(0, 3)):
        tokens = torch.randint(1, MOE_VOCAB, (len(rows[part]), 2))
        positions = lengths[part, None] + torch.arange(2)
        options = {"hidden_layers": (1,), "max_position": 20}
        expected = plain.forward(tokens, rows[part], positions, **options)
        actual = replayed.forward(tokens, rows[part], positions, **options)
        torch.testing.assert_close(actual.logits, expected.logits)
        torch.testing.assert_close(actual.hidden, expected.hidden)
        lengths = lengths + 2
    assert len(graphs) == before + 2, "of three rows and of two"
    for a, b in zip(plain.cache.ragged_layers, replayed.cache.ragged_layers, strict=True):
        torch.testing.assert_close(a.keys[:, :40], b.keys[:, :40])
