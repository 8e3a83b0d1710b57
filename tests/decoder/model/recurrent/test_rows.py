"""Gates of models' own code: a token's bits do not depend on how many tokens there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import silu, softplus
from transformers.models.qwen3_next import modeling_qwen3_next

from decoder.model.recurrent import functions
from decoder.model.recurrent.rows import rows_apart
from decoder.model.runner import ModelRunner


def tokens(width: int) -> Tensor:
    return torch.randn(3, 7, width, generator=torch.Generator().manual_seed(width))


def alone(gate: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.stack([gate(row) for row in x.flatten(0, 1)]).view_as(x)


@pytest.mark.parametrize("gate", [softplus, silu, torch.sigmoid])
@pytest.mark.parametrize("width", [1, 12, 30, 48, 64, 100])
def test_rows_are_the_same_alone(gate: Callable[[Tensor], Tensor], width: int) -> None:
    x = tokens(width)
    for laid in (x, x.mT.contiguous().mT):
        assert torch.equal(gate(rows_apart(laid)), alone(gate, x))


def test_a_modelling_file_makes_its_gates_so(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.Qwen3NextConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=2, linear_num_value_heads=12, linear_num_key_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=32, shared_expert_intermediate_size=32,
    )  # fmt: skip
    runner = ModelRunner(transformers.Qwen3NextForCausalLM(config).eval(), 1, 32)
    theirs, x = modeling_qwen3_next.F, tokens(12)
    assert theirs.silu is silu and torch.equal(theirs.softplus(x), softplus(x))
    monkeypatch.setattr(functions, "active", lambda: runner.cache.recurrent)
    assert torch.equal(theirs.softplus(x), alone(softplus, x))
