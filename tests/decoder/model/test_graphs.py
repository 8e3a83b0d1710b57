"""Static-shape forwards: padded buckets give what the plain path gives; capture only on a GPU."""

import pytest
import torch
from support.tiny import MOE_VOCAB, ragged_prompts, tiny_moe

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import DraftOptions, build_drafter
from decoder.model.graphs import ForwardGraphs
from decoder.model.runner import ModelRunner

torch.set_num_threads(1)


def test_buckets_cover_every_batch_and_length():
    graphs = ForwardGraphs(20, 704, torch.device("cpu"), capture=False)
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


def test_the_least_recently_used_shapes_are_dropped(monkeypatch):
    monkeypatch.setattr("decoder.model.graphs.MAX_ENTRIES", 2)
    graphs = ForwardGraphs(4, 64, torch.device("cpu"), capture=False)
    made = []

    def forward(ids, rows, positions, *_):
        made.append(ids.shape[1])
        return ids + positions, None

    new_entry = graphs._new_entry
    built = []
    monkeypatch.setattr(graphs, "_new_entry", lambda key: built.append(key) or new_entry(key))
    for queries in (1, 2, 1, 3, 1, 2):
        ids = torch.full((1, queries), queries)
        logits, _ = graphs(forward, ids, torch.zeros(1).long(), torch.ones_like(ids), 5)
        assert torch.equal(logits, ids + 1)
    assert made == [1, 2, 1, 3, 1, 2] and len(graphs) == 2
    assert [key.queries for key in built] == [1, 2, 3, 2], "2 was used least recently, then again"


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


def test_eager_forwards_leave_the_buffers_alone():
    runner = ModelRunner(tiny_moe(), 2, 40, attention="portable", static=True)
    positions = torch.zeros(1, 1, dtype=torch.long)
    before = len(runner._graphs)
    with runner.eager():
        runner.forward(torch.full_like(positions, 7), torch.zeros(1, dtype=torch.long), positions)
    assert len(runner._graphs) == before
    runner.forward(torch.full_like(positions, 7), torch.zeros(1, dtype=torch.long), positions)
    assert len(runner._graphs) == before + 1
