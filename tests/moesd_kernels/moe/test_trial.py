"""A block of known parts is taken if it puts them together as ``MoE`` does, whatever it holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny import sparse_model
from torch import Tensor, nn
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP, DeepseekV3MoE

from moesd_kernels import MoE, accelerate


class Clamped(DeepseekV3MLP):  # type: ignore[misc]
    """A shared expert that differs for large inputs only."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.act_fn(self.gate_proj(x)).clamp(max=5.0)
        return self.down_proj(gate * self.up_proj(x))  # type: ignore[no-any-return]


class Opaque(nn.Module):
    """A shared expert whose matrices have other names."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = mlp.gate_proj, mlp.down_proj, mlp.up_proj


def normed(block: Any, routed: Tensor, shared: Tensor, x: Tensor) -> Tensor:
    return block.norm(routed + shared)  # type: ignore[no-any-return]


SUMS: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "a norm behind the sum": normed,
    "a factor on the sum": lambda _, routed, shared, x: 2.5 * (routed + shared),
    "no shared expert": lambda _, routed, shared, x: routed,
    "the input on top": lambda _, routed, shared, x: routed + shared + x,
    "clamped far out": lambda _, routed, shared, x: (routed + shared).clamp(max=50.0),
    "an error": lambda block, routed, shared, x: block.nothing,
    "no tensor": lambda _, routed, shared, x: None,  # type: ignore[arg-type,return-value]
}


def deepseek(kind: type = DeepseekV3MoE) -> Any:
    model = sparse_model("deepseek_v3")
    block = copy.deepcopy(next(m for m in model.modules() if isinstance(m, DeepseekV3MoE)))
    block.__class__ = kind
    return block


def summing(how: Callable[..., Tensor]) -> type:
    class Other(DeepseekV3MoE):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            rows = x.view(-1, x.shape[-1])
            _, weights, ids = self.gate(x)
            routed = self.experts(rows, ids, weights).view_as(x)
            return how(self, routed, self.shared_experts(x), x)

    return Other


def test_one_that_sums_the_same_is_taken() -> None:
    block = deepseek(summing(lambda _, routed, shared, x: shared + routed))
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(MoE.from_transformers(block)(x), block(x))


@pytest.mark.parametrize("how", SUMS)
def test_one_that_sums_otherwise_is_refused(how: str) -> None:
    block = deepseek(summing(SUMS[how]))
    if how == "a norm behind the sum":
        block.norm = nn.RMSNorm(32)
    with pytest.raises(ValueError, match="what Other computes of its parts is not what MoE does"):
        MoE.from_transformers(block)


def test_another_shared_expert_is_refused() -> None:
    block = deepseek()
    block.shared_experts.__class__ = Clamped
    with pytest.raises(ValueError, match=r"for inputs of \d+\.0 they differ by"):
        MoE.from_transformers(block)
    block.shared_experts = Opaque(block.shared_experts)
    with pytest.raises(ValueError, match="a shared expert must have up_proj, got Opaque"):
        MoE.from_transformers(block)


def test_a_part_with_more_tensors_is_refused() -> None:
    block = deepseek()
    block.shared_experts.up_proj.bias = nn.Parameter(torch.ones(16))
    with pytest.raises(ValueError, match=r"Unexpected key.*up_proj\.bias"):
        MoE.from_transformers(block)


def refusing(*_: Any) -> None:
    raise AssertionError("the block itself ran")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_block_and_the_random_state_stay_as_they_are(dtype: torch.dtype) -> None:
    block = deepseek().to(dtype).train()
    block.register_forward_hook(refusing)
    block.experts.config._experts_implementation = "grouped_mm"
    before = {name: (id(p), p.clone()) for name, p in block.state_dict(keep_vars=True).items()}
    state = torch.get_rng_state()
    assert MoE.from_transformers(block).training
    assert torch.equal(torch.get_rng_state(), state)
    assert block.training and block.experts.config._experts_implementation == "grouped_mm"
    for name, tensor in block.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0] and torch.equal(tensor, before[name][1]), name


def test_what_the_block_holds_does_not_matter() -> None:
    """Zeros give zeros whatever a block does, and NaN equals nothing."""
    for value in (0.0, float("nan")):
        block = deepseek()
        other = deepseek(summing(SUMS["a factor on the sum"]))
        for tensor in (*block.parameters(), *other.parameters()):
            nn.init.constant_(tensor, value)
        MoE.from_transformers(block)
        with pytest.raises(ValueError, match="what Other computes"):
            MoE.from_transformers(other)


def test_a_block_of_an_accelerated_model_is_taken() -> None:
    model = accelerate(copy.deepcopy(sparse_model("deepseek_v3")))
    block = next(m for m in model.modules() if isinstance(m, DeepseekV3MoE))
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(MoE.from_transformers(block)(x), block(x))


def test_a_block_of_the_published_size_is_tried_without_its_weights() -> None:
    """22 GB in bf16, of which nothing is made."""
    with torch.device("meta"):
        block = DeepseekV3MoE(DeepseekV3Config())
    moe = MoE.from_transformers(block)
    assert moe.experts.gate_up_proj.shape == (256, 4096, 7168)
    assert all(tensor.device.type == "meta" for tensor in moe.state_dict().values())
