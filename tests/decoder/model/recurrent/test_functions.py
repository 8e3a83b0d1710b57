"""Who finds states in a model's recurrent layers: a forward over ragged rows, and nobody else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.families import build
from support.tiny import random_prompts

from decoder.errors import UserError
from decoder.model.recurrent.functions import FUNCTIONS, adapt
from decoder.model.runner import ModelRunner


def test_a_model_runs_as_it_did_beside_a_forward_over_rows() -> None:
    model, ids = build("BambaForCausalLM"), torch.tensor(random_prompts(1, low=9))
    call = lambda: model(input_ids=ids, use_cache=False).logits
    expected = call()
    runner = ModelRunner(model, 2, 32)
    assert torch.equal(call(), expected)
    recurrent = runner.cache.recurrent
    assert recurrent is not None
    with ThreadPoolExecutor() as pool, recurrent.running(ids[0], ids, None):
        assert torch.equal(pool.submit(call).result(), expected)
    assert adapt(model) == adapt(model) == ["causal_conv1d_fn", "mamba2_chunk_scan"]


def test_every_function_is_somebody_s() -> None:
    names = "Qwen3Next", "KimiLinear", "Bamba", "Mamba"
    found = {name for model in names for name in adapt(build(f"{model}ForCausalLM"))}
    assert found == set(FUNCTIONS)


def test_layers_that_nothing_stands_for_are_refused_by_name() -> None:
    reason = "linear_attention layers .MiniMaxLightningAttention in model.layers.1.self_attn."
    with pytest.raises(UserError, match=reason):
        ModelRunner(build("MiniMaxForCausalLM"), 1, 16)


def test_a_hybrid_of_attention_alone_has_no_states() -> None:
    model = build("Qwen3NextForCausalLM", layer_types=["full_attention", "full_attention"])
    assert ModelRunner(model, 1, 16).cache.recurrent is None
