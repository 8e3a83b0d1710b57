"""The decoder's EAGLE-3 head computes what the training's own forward computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters.eagle import EagleDrafter
from decoder.drafters.heads.eagle_head import EagleHead
from decoder.drafters.heads.eagle_loader import is_eagle_checkpoint, load_eagle
from decoder.model.attention import Placement
from decoder.model.cache import RaggedCache
from training.upcycle.eagle.head import Eagle3, head_config, save_head, start_from_dense

H, V, LENGTH, DEPTHS = 32, 64, 12, 3
VOCABULARY = torch.arange(1, V, 2)


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def head(dense: LlamaForCausalLM) -> Eagle3:
    """As it begins, then with every weight moved, and rounded as its file is."""
    head = Eagle3(head_config(dense.config, len(VOCABULARY), inner=40)).eval()
    start_from_dense(head, dense)
    with torch.no_grad():
        for weight in head.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
            weight.copy_(weight.bfloat16())
    return head


@pytest.fixture(scope="module")
def saved(head: Eagle3, dense: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("head")
    save_head(head, VOCABULARY, dense.lm_head.weight, path)
    return path


def test_it_begins_as_the_dense_models_last_layer(dense: LlamaForCausalLM) -> None:
    head = Eagle3(head_config(dense.config, len(VOCABULARY), inner=40)).eval()
    start_from_dense(head, dense)
    features = torch.randn(1, 5, 3 * H)
    torch.testing.assert_close(head.fc(features), features[..., -H:])
    last = dense.model.layers[-1]
    q_proj = head.midlayer.self_attn.q_proj.weight
    assert torch.equal(q_proj[:, H:], last.self_attn.q_proj.weight)
    rows = {tuple(row) for row in last.mlp.gate_proj.weight.tolist()}
    assert {tuple(row) for row in head.midlayer.mlp.gate_proj.weight.tolist()} < rows


@torch.no_grad()
def test_every_draft_depth_equals_the_decoders(
    head: Eagle3, saved: Path, dense: LlamaForCausalLM
) -> None:
    assert is_eagle_checkpoint(saved)
    embedding = torch.randn(V, H)
    tokens, features = torch.randint(0, V, (2, LENGTH)), torch.randn(2, LENGTH, 3 * H)
    expected = head.depths(embedding[tokens], features, DEPTHS)
    theirs = EagleHead(load_eagle(saved), embedding, dense.lm_head)
    cache, rows = RaggedCache(3, 64), torch.tensor([2, 0])

    def run(ids: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cache.select(rows, positions)
        return theirs(ids, hidden, cache, Placement(rows, positions, LENGTH))

    for end in range(1, LENGTH - DEPTHS):
        positions = torch.arange(end).repeat(2, 1)
        hidden = run(tokens[:, :end], theirs.fuse(features[:, :end]), positions)[:, -1:]
        for depth in range(DEPTHS):
            at = end - 1 + depth
            if depth:
                hidden = run(tokens[:, at, None], hidden, torch.full((2, 1), at))
            ours = expected[depth][:, at, None]
            torch.testing.assert_close(theirs.norm(hidden), ours, atol=1e-5, rtol=1e-4)
            logits = theirs.logits(hidden, V)
            rows_of_target = dense.lm_head.weight[VOCABULARY].bfloat16().float()
            torch.testing.assert_close(
                logits[..., VOCABULARY], ours @ rows_of_target.T, atol=1e-4, rtol=1e-4
            )
            assert logits[..., ::2].eq(-torch.inf).all()


def test_it_drafts_for_its_target_without_changing_what_that_says(
    saved: Path, dense: LlamaForCausalLM
) -> None:
    prompts, params = [[3, 5, 7], [11, 2, 9, 4]], SamplingParams(max_new_tokens=12)
    settings = {"max_batch_size": 2, "max_length": 64}
    plain = SpeculativeDecoder(dense, gamma=0, **settings).generate(prompts, params)
    drafter = EagleDrafter(saved)
    assert load_eagle(saved).config.feature_layers == (2, 3, 3)
    drafted = SpeculativeDecoder(dense, drafter=drafter, gamma=2, **settings)
    assert [o.token_ids for o in drafted.generate(prompts, params)] == [o.token_ids for o in plain]
    assert drafted.stats.alpha is not None
