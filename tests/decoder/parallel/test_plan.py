"""What cannot be divided among ranks is said in one line, before weights are read."""

from __future__ import annotations

from typing import Any

import pytest
from support.families import build
from support.tiny import tiny_model
from support.versions import needs_the_transformers_of_the_families_page

from decoder.errors import UserError
from decoder.parallel.plan import distributed_config

REFUSED = [
    ("qwen3_moe", {}, "expert", 3, "8 experts of Qwen3MoeForCausalLM cannot be divided evenly"),
    ("qwen3_moe", {}, "expert", 16, "8 experts of Qwen3MoeForCausalLM cannot be divided evenly"),
    ("qwen3", {}, "expert", 2, "Qwen3ForCausalLM has no experts to divide among ranks"),
    ("qwen3_moe", {}, "tensor", 4, "2 key value heads of Qwen3MoeForCausalLM cannot be divided"),
    ("qwen3_moe", {"moe_intermediate_size": 6, "num_key_value_heads": 4}, "tensor", 4,
     "experts.gate_up_proj of Qwen3MoeForCausalLM has 6 features"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "mode", "size", "message"), REFUSED)
def test_refused(family: str, changes: dict[str, Any], mode: Any, size: int, message: str) -> None:
    config = tiny_model(family, **changes).config
    with pytest.raises(UserError, match=message):
        distributed_config(config, mode, size)


@pytest.mark.parametrize(("mode", "name"), [("expert", "ep"), ("tensor", "tp")])
def test_a_model_without_a_plan_is_refused(mode: Any, name: str) -> None:
    config = tiny_model("qwen3_moe").config
    setattr(config, f"base_model_{name}_plan", None)
    with pytest.raises(UserError, match=f"transformers has no {mode}-parallel plan for Qwen3Moe"):
        distributed_config(config, mode, 2)


def test_what_a_plan_has_that_is_not_known_is_named() -> None:
    config = tiny_model("qwen3_moe").config
    own = type(config).base_model_tp_plan
    config.base_model_tp_plan = {**own, "layers.*.mlp.gate": "sequence_parallel"}
    with pytest.raises(UserError, match=r"mlp.gate of .* in the style 'sequence_parallel'"):
        distributed_config(config, "tensor", 2)
    config = tiny_model("gpt_oss").config
    config.base_model_tp_plan = {"layers.*.mlp.experts": "moe_tp_experts"}
    with pytest.raises(UserError, match=r"layers.0.mlp.experts of GptOssForCausalLM has biases"):
        distributed_config(config, "tensor", 2)


@needs_the_transformers_of_the_families_page
@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("Gemma3nForCausalLM", r"layers.0.mlp of .* by the mean and deviation of all of them"),
        ("HrmTextForCausalLM", r"self_attn.q_proj.weight of .* lies in files joined with others"),
    ],
)
def test_what_parts_would_compute_otherwise_is_refused(family: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        distributed_config(build(family).config, "tensor", 2)


def test_quantised_weights_are_refused() -> None:
    config = tiny_model("qwen3_moe").config
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(UserError, match="quantised weights"):
        distributed_config(config, "expert", 2)


@pytest.mark.parametrize("mode", ["expert", "tensor"])
def test_the_config_is_left_as_it_is(mode: Any) -> None:
    config = tiny_model("qwen3_moe").config
    before = config.to_dict()
    assert distributed_config(config, mode, 2).tp_size == 2
    assert config.to_dict() == before
