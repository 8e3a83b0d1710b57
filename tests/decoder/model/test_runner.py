"""The runner against the model's own cacheless forward, and the KV audit."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from support.tiny import MOE_VOCAB, ragged_prompts, tiny_moe

from decoder.errors import UserError
from decoder.model.attention import Placement, ragged_attention, reference_attention
from decoder.model.cache import whole_blocks
from decoder.model.prefill import prefill_parts
from decoder.model.runner import ModelRunner

torch.set_num_threads(1)


def fresh_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts])
    return ids, torch.tensor([len(p) for p in prompts])


def test_prefill_and_decode_match_a_cacheless_forward():
    model = tiny_moe()
    runner = ModelRunner(model, 4, 64)
    prompts = ragged_prompts(3)
    rows = torch.tensor([3, 0, 2])
    ids, lengths = padded(prompts)
    first = runner.prefill(rows, ids, lengths, hidden_layers=(0, -1))
    more = torch.randint(1, MOE_VOCAB, (3, 4))
    out = runner.forward(more, rows, lengths[:, None] + torch.arange(4), hidden_layers=(0, -1))
    for b, prompt in enumerate(prompts):
        expected = fresh_logits(model, prompt + more[b].tolist())
        torch.testing.assert_close(first.logits[b, 0], expected[len(prompt) - 1])
        torch.testing.assert_close(out.logits[b], expected[len(prompt) :])
    assert first.hidden.shape == (3, ids.shape[1], 2 * 32)
    assert not first.hidden[0, 1:].any(), "hidden states of padding must be zero"
    with torch.no_grad():
        states = model(more[:1], use_cache=False, output_hidden_states=True).hidden_states
    torch.testing.assert_close(out.hidden[0, :, :32], states[0][0])


def test_chunked_prefill_equals_one_chunk(monkeypatch):
    model = tiny_moe()
    prompts = ragged_prompts(5, seed=1, longest=30)
    ids, lengths = padded(prompts)
    rows = torch.arange(5)
    whole = ModelRunner(model, 5, 64).prefill(rows, ids, lengths, hidden_layers=(1,))
    monkeypatch.setattr("decoder.model.prefill.PREFILL_CHUNK", 7)
    monkeypatch.setattr("decoder.model.prefill._PREFILL_TOKENS", 14)
    parts = ModelRunner(model, 5, 64).prefill(rows, ids, lengths, hidden_layers=(1,))
    torch.testing.assert_close(parts.logits, whole.logits)
    torch.testing.assert_close(parts.hidden, whole.hidden)


def test_stale_positions_are_never_read():
    """KV audit: large finite values beyond every length change nothing, and below it the slabs
    equal a fresh prefill."""
    model = tiny_moe()
    runner, clean = ModelRunner(model, 2, 64), ModelRunner(model, 2, 64)
    prompts = ragged_prompts(2, seed=2)
    ids, lengths = padded(prompts)
    rows = torch.arange(2)
    runner.prefill(rows, ids, lengths)
    # A rejected draft of three, then the tokens that were really chosen.
    rejected = torch.randint(1, MOE_VOCAB, (2, 4))
    runner.forward(rejected, rows, lengths[:, None] + torch.arange(4))
    with torch.inference_mode():
        for layer in runner.cache.ragged_layers:
            for b in range(2):
                layer.keys[b, lengths[b] :] = 1e6
                layer.values[b, lengths[b] :] = -1e6
    chosen = torch.randint(1, MOE_VOCAB, (2, 3))
    out = runner.forward(chosen, rows, lengths[:, None] + torch.arange(3))
    longer = [p + c for p, c in zip(prompts, chosen.tolist(), strict=True)]
    clean.prefill(rows, *padded(longer))
    for b in range(2):
        expected = fresh_logits(model, longer[b])[len(prompts[b]) :]
        torch.testing.assert_close(out.logits[b], expected)
        n = len(longer[b])
        for mine, fresh in zip(runner.cache.ragged_layers, clean.cache.ragged_layers, strict=True):
            torch.testing.assert_close(mine.keys[b, :n], fresh.keys[b, :n], atol=1e-10, rtol=0)
            torch.testing.assert_close(mine.values[b, :n], fresh.values[b, :n], atol=1e-10, rtol=0)


def test_padding_queries_disturb_nobody():
    model = tiny_moe()
    runner = ModelRunner(model, 3, 64)
    ids, lengths = padded(ragged_prompts(3, seed=3))
    rows = torch.arange(3)
    runner.prefill(rows, ids, lengths)
    before = [layer.keys.clone() for layer in runner.cache.ragged_layers]
    tokens = torch.randint(1, MOE_VOCAB, (3, 2))
    positions = torch.stack([lengths, torch.full_like(lengths, -1)], 1)
    out = runner.forward(tokens, rows, positions)
    alone = ModelRunner(model, 3, 64)
    alone.prefill(rows, ids, lengths)
    expected = alone.forward(tokens[:, :1], rows, lengths[:, None])
    torch.testing.assert_close(out.logits[:, :1], expected.logits)
    assert out.logits.isfinite().all()
    for layer, old in zip(runner.cache.ragged_layers, before, strict=True):
        changed = (layer.keys != old).flatten(2).any(-1)[:, :-1]
        assert changed.sum() == 3, "only the position at each row's length may change"


def test_model_keeps_its_own_attention_between_forwards():
    model = tiny_moe()
    implementation = model.config._attn_implementation
    runner = ModelRunner(model, 1, 32)
    runner.prefill(torch.tensor([0]), torch.tensor([[7, 8]]), torch.tensor([2]))
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("group", [1, 2])
def test_packed_attention_equals_the_reference(window, group):
    torch.manual_seed(0)
    q = torch.randn(2, 3, 2 * group, 8, dtype=torch.float64)
    keys, values = torch.randn(2, 4, 16, 2, 8, dtype=torch.float64).unbind(0)
    placement = Placement(torch.tensor([3, 1]), torch.tensor([[4, 5, 6], [0, 1, -1]]), 8)
    out = ragged_attention(q, keys, values, placement, scale=0.3, window=window)
    rows = keys[[3, 1], :8], values[[3, 1], :8]
    expected = reference_attention(q, *rows, placement.visible(window), 0.3, None, None)
    torch.testing.assert_close(out[0], expected[0])
    torch.testing.assert_close(out[1, :2], expected[1, :2])
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_capped_query_is_computed_alike_in_any_batch(dtype):
    """Gemma 2's, which no kernel of ours takes."""
    torch.manual_seed(0)
    q = torch.randn(4, 5, 8, 64, dtype=dtype)
    keys, values = torch.randn(2, 4, 256, 4, 64, dtype=dtype).unbind(0)
    positions = torch.tensor([[7], [60], [130], [200]]) + torch.arange(5)
    call = partial(ragged_attention, keys=keys, values=values, scale=0.5, softcap=30.0)
    together = call(q, placement=Placement(None, positions, 256))
    for b, row in enumerate(positions):
        for i, position in enumerate(row):
            length = whole_blocks(int(position) + 1)
            alone = Placement(torch.tensor([b]), position.view(1, 1), length)
            assert torch.equal(call(q[b : b + 1, i : i + 1], placement=alone)[0, 0], together[b, i])


def test_sinks_take_probability_and_give_nothing():
    q = torch.zeros(1, 1, 2, 4)
    keys = values = torch.ones(1, 8, 2, 4)
    placement = Placement(None, torch.tensor([[2]]), 8)
    sinks = torch.tensor([-torch.inf, 0.0])
    out = ragged_attention(q, keys, values, placement, scale=1.0, sinks=sinks)
    torch.testing.assert_close(out[0, 0, :, 0], torch.tensor([1.0, 0.75]))


def test_refuses_what_cannot_be_rolled_back():
    from transformers import AutoModelForCausalLM, BloomConfig, RwkvConfig

    rwkv = AutoModelForCausalLM.from_config(
        RwkvConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2)
    )
    with pytest.raises(UserError, match="state cannot be rolled back"):
        ModelRunner(rwkv, 1, 16)
    bloom = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=11, hidden_size=8, n_layer=1, n_head=2)
    )
    with pytest.raises(UserError, match="cannot be decoded over a ragged cache"):
        ModelRunner(bloom, 1, 16)


def test_scaled_logits_are_kept():
    """granitemoe divides logits after the head; the head alone must not be taken for them."""
    from transformers import AutoModelForCausalLM, GraniteMoeConfig

    torch.manual_seed(0)
    config = GraniteMoeConfig(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
        logits_scaling=3.0, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().eval()
    runner = ModelRunner(model, 1, 16)
    out = runner.prefill(torch.tensor([0]), torch.tensor([[3, 4, 5]]), torch.tensor([3]))
    torch.testing.assert_close(out.logits[0, 0], fresh_logits(model, [3, 4, 5])[-1])


@pytest.mark.parametrize(
    "lengths, parts",
    [
        ([7], [(0, 1)]),
        ([50, 50, 49, 48], [(0, 4)]),  # nothing to gain from a second forward
        ([400, 390, 30, 20, 10], [(0, 2), (2, 5)]),  # padding 30 to 400 costs more
    ],
)
def test_prompts_are_cut_where_padding_costs_most(lengths, parts):
    assert prefill_parts(lengths) == parts


def test_prefill_forwards_are_bounded():
    found = prefill_parts([4000] * 40)
    assert (found[0][0], found[-1][1]) == (0, 40)
    assert all(a[1] == b[0] for a, b in pairwise(found))
    assert max(end - start for start, end in found) <= 16  # of 256 tokens a forward


def test_an_unknown_attention_is_refused_by_the_list_that_the_command_line_reads():
    with pytest.raises(ValueError, match="one of auto, portable, got 'flash'"):
        ModelRunner(tiny_moe(), 1, 32, attention="flash")
