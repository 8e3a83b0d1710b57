"""Hybrids and attention-free models: every matrix counted, and what they keep of a sequence."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from decoder.__main__ import main
from decoder.perf_model.config_spec import spec_from_config
from decoder.perf_model.forward_model import Adjustments, ForwardModel
from decoder.perf_model.hardware.machine import named_machine
from decoder.perf_model.layers.recurrent import FAMILIES
from decoder.perf_model.model_spec import LayerSpec, ModelSpec, eagle_spec
from decoder.perf_model.presets import preset_spec

_SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 500, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 16, "head_dim": 32,
}  # fmt: skip
_MOE = {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}  # fmt: skip
_LATENT = {
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_shared_experts": 2, "num_local_experts": 8, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 32, "num_key_value_heads": 4,
}  # fmt: skip
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_n_groups": 2}
_NEMOTRON = {
    "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8, "head_dim": 32,
    "n_routed_experts": 8, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48,
}  # fmt: skip
_ZAMBA2 = {
    "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_ngroups": 2, "adapter_rank": 8,
    "num_mem_blocks": 2, "num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid"] * 3,
}  # fmt: skip
_M, _A = "linear_attention", "full_attention"
# family -> fields, and which of the layers keep a state (r), a cache (a), both (b) or neither (-)
FAMILY_CASES: list[tuple[str, dict, str]] = [
    ("qwen3_next", _DELTA | _MOE, "rrra"),
    ("qwen3_next", _DELTA | _MOE | {"layer_types": [_A] * 4}, "aaaa"),  # all attention
    ("qwen3_next", _DELTA | _MOE | {"mlp_only_layers": [1]}, "rrra"),
    ("qwen3_5_moe_text", _DELTA | _MOE | {"full_attention_interval": 2}, "rara"),
    ("qwen3_5_text", _DELTA, "rrra"),
    ("olmo_hybrid", _DELTA | {"head_dim": 16}, "rrra"),
    (
        "kimi_linear",
        _LATENT | {
            "linear_attn_config": {
                "full_attn_layers": [2, 4], "kda_layers": [1, 3], "head_dim": 16, "num_heads": 4,
                "short_conv_kernel_size": 3,
            },
        },
        "rara",
    ),
    ("bailing_hybrid", _LATENT | {"head_dim": 16, "layer_group_size": 2}, "rara"),
    ("nemotron_h", _NEMOTRON | {"hybrid_override_pattern": "M-E*"}, "r--a"),
    ("nemotron_h", _NEMOTRON | {"layers_block_type": ["mamba", "moe", "attention", "mlp"],
                                "moe_latent_size": 24}, "r-a-"),
    ("granitemoehybrid", _MAMBA2 | {"shared_intermediate_size": 80, "num_local_experts": 8,
                                    "layer_types": ["mamba", "attention"] * 2}, "rara"),
    ("granitemoehybrid", _MAMBA2 | {"shared_intermediate_size": 80, "num_local_experts": 0,
                                    "layers_block_type": [_M] * 4}, "rrrr"),
    ("lfm2", {"full_attn_idxs": [1]}, "rarr"),
    ("lfm2", {"full_attn_idxs": [0], "block_auto_adjust_ff_dim": False}, "arrr"),
    ("lfm2_moe", {"num_experts": 8, "moe_intermediate_size": 32, "num_dense_layers": 1,
                  "layer_types": ["conv", _A] * 2}, "rara"),
    ("jamba", {"mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1,
               "num_experts": 4}, "rara"),
    ("bamba", _MAMBA2 | {"attn_layer_indices": [1]}, "rarr"),
    ("falcon_h1", _MAMBA2 | {"mamba_d_ssm": 64}, "bbbb"),
    ("falcon_h1", _MAMBA2 | {"mamba_d_ssm": None}, "bbbb"),
    ("zamba2", _ZAMBA2, "rbrbrb"),
    ("zamba2", _ZAMBA2 | {"use_shared_attention_adapter": True, "num_mem_blocks": 1}, "rbrbrb"),
    ("mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 2}, "rrrr"),
    ("mamba", {"state_size": 8, "intermediate_size": 128}, "rrrr"),
    ("falcon_mamba", {"state_size": 8, "intermediate_size": 128}, "rrrr"),
    ("minimax", {"num_local_experts": 4}, "arar"),
]  # fmt: skip


def known(kind: str) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")


def kept(layer: LayerSpec) -> str:
    return {(0, 0): "-", (0, 1): "r", (1, 0): "a", (1, 1): "b"}[
        (int(layer.kv_width > 0), int(layer.ring_width > 0))
    ]


def test_every_family_has_a_case() -> None:
    assert {kind for kind, _, _ in FAMILY_CASES} == FAMILIES.keys()


@pytest.mark.parametrize(("kind", "fields", "keeps"), FAMILY_CASES)
def test_every_matrix_of_the_real_model_is_counted(kind: str, fields: dict, keeps: str) -> None:
    known(kind)
    config = AutoConfig.for_model(kind, **(_SHAPE | fields))
    with torch.device("meta"):
        parameters = list(AutoModelForCausalLM.from_config(config).parameters())
    spec = spec_from_config(config)
    # a vector (norm, bias, per-head gate) has at most one dimension beyond 1
    matrices = sum(p.numel() for p in parameters if sum(size > 1 for size in p.shape) > 1)
    assert spec.total_params == matrices
    assert matrices == pytest.approx(sum(p.numel() for p in parameters), rel=0.02)
    assert "".join(map(kept, spec.layers)) == keeps
    assert spec_from_config(json.loads(config.to_json_string(use_diff=False))) == spec
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))).total_params == matrices


@pytest.mark.parametrize(
    ("kind", "fields", "shape"),
    [
        ("qwen3_next", _DELTA | _MOE, (4, 8, 16)),
        ("olmo_hybrid", _DELTA | {"head_dim": 16}, (4, 8, 16)),
        ("granitemoehybrid", _MAMBA2 | {"shared_intermediate_size": 80}, (8, 16, 8)),
        ("jamba", {"mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1}, (128, 8)),
    ],
)
def test_states_are_those_of_the_real_cache(kind: str, fields: dict, shape: tuple) -> None:
    """A tiny model's own cache after one step; the window holds one input less than the kernel."""
    known(kind)
    layers = {"num_hidden_layers": 2} | ({} if kind == "jamba" else {"layer_types": [_M, _A]})
    config = AutoConfig.for_model(kind, **(_SHAPE | fields | layers))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(torch.tensor([[3, 4]]), use_cache=True)
    states = (cache.get("past_key_values") or cache.get("cache_params")).layers
    spec = spec_from_config(config)
    layer, real = next(
        pair for pair in zip(spec.layers, states, strict=True) if pair[0].state_width
    )
    (recurrent,) = (t for t in vars(real).values() for t in _tensors(t) if t.shape[1:] == shape)
    assert recurrent.numel() == layer.state_width == math.prod(shape)


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [t for t in values if isinstance(t, torch.Tensor)] if isinstance(
        value, dict | list | tuple) else []  # fmt: skip


def test_what_a_row_keeps_of_qwen3_next() -> None:
    spec = preset_spec("qwen3-next-80b-a3b")
    state, channels = 32 * 128 * 128, 2 * 16 * 128 + 32 * 128
    assert spec.recurrent_bytes(0) == 36 * (4 * state + 2 * 3 * channels)
    assert spec.recurrent_bytes(5) - spec.recurrent_bytes(0) == 36 * 2 * 5 * (2 * channels + 64)
    assert spec.recurrent_bytes(5) < 1.25 * 36 * 4 * state
    assert spec.kv_cache_bytes(1) == 12 * 2 * 2 * 256 * 2  # attention layers only
    assert preset_spec("qwen3-30b-a3b").recurrent_bytes(5) == 0


def test_shared_layers_are_stored_once_and_read_each_time() -> None:
    config = AutoConfig.for_model("zamba2", **(_SHAPE | _ZAMBA2))
    one, two = (
        spec_from_config({**config.to_dict(), "num_mem_blocks": blocks}) for blocks in (1, 2)
    )
    block = 2 * 64 * 32 * (4 + 2 * 2) + 4 * 32 * 64 + 3 * 64 * 96  # attention over 2H, and MLP
    assert two.total_params - one.total_params == block
    assert two.dense_weight_bytes == one.dense_weight_bytes
    assert two.weight_bytes - one.weight_bytes == 2 * block


def test_a_draft_head_has_attention() -> None:
    head = eagle_spec(preset_spec("nemotron-3-nano-30b-a3b"))
    assert [kept(layer) for layer in head.layers] == ["a"] and head.recurrent_bytes(5) == 0


H200 = named_machine("h200")
# nothing but states: neither weights nor launches nor work per token
STATES = LayerSpec(
    attention=0, query_width=0, kv_width=0, window=None, dense=1, state_width=10**6,
    conv_width=3000, ring_width=1000,
)  # fmt: skip
BARE = ModelSpec("bare", 64, 1, (STATES,) * 10, embedding=1, head=1, tied=True)
MODEL = ForwardModel(
    BARE, replace(H200, launch=1e-18), adjust=Adjustments(token=0.0), sharpness=50.0
)


def test_a_state_is_read_and_written_once_a_step_whatever_the_tokens() -> None:
    for batch, gamma in ((1, 0), (8, 0), (8, 4), (64, 4)):
        kept_bytes = 10**6 * 4 + (3000 + (gamma + 1) * 1000) * 2
        expected = 10 * batch * 2 * kept_bytes / H200.bandwidth
        assert MODEL.forward_time(BARE, batch, gamma + 1) == pytest.approx(expected, rel=0.01)
    times = MODEL.round_times(8, 4)
    assert times.verify < 1.01 * times.ar
    assert MODEL.round_times(8, 4, 100_000) == times  # not of the context


def test_many_tokens_are_bound_by_arithmetic() -> None:
    few, many = (MODEL.forward_time(BARE, 8, tokens) for tokens in (64, 256))
    assert many == pytest.approx(4 * few, rel=0.05)


def test_states_grow_in_weight_with_the_batch() -> None:
    """Reading states is a cost of a row, as caches are: a batch makes it no cheaper."""
    hybrid = preset_spec("granite-4.0-h-small")
    plain = replace(
        hybrid, layers=tuple(replace(x, state_width=0, ring_width=0) for x in hybrid.layers)
    )
    shares = [
        1 - ForwardModel(plain, H200).forward_time(plain, batch, 1)
        / ForwardModel(hybrid, H200).forward_time(hybrid, batch, 1)
        for batch in (1, 16, 256)
    ]  # fmt: skip
    assert 0 < shares[0] < shares[1] < shares[2]


@pytest.mark.parametrize("name", ["granite-4.0-h-small", "nemotron-3-nano-30b-a3b"])
def test_plan_knows_hybrids(capsys: pytest.CaptureFixture[str], tmp_path, name: str) -> None:
    assert main(["plan", "--target", name, "--machine", "h200", "--batch-sizes", "1,64"]) == 0
    assert "recurrent layers keep" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layer_types": ["linear_attention"]}, "recurrent layers of '': expected one of"),
        ({"layer_types": ["zigzag"]}, "layer type 'zigzag' of '' is not known"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types must name the 1 layers, got 2"),
        ({"layer_types": "full_attention"}, "layer_types must be a list of names"),
        ({"layer_types": [7]}, "layer_types must be a list of names"),
        (
            {"model_type": "zamba", "num_hidden_layers": 3},
            "recurrent layers of 'zamba': expected one of",
        ),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "MX"}, "KeyError: 'X'"),
        ({"model_type": ["mamba"]}, "config describes no ['mamba']"),
        ({"model_type": "mamba", "time_step_max": {"__float__": "much"}}, "no 'mamba': could not"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": ""}, "num_hidden_layers"),
        ({"model_type": "qwen3_next", "linear_num_key_heads": 0}, "linear_num_key_heads must be"),
        ({"model_type": "qwen3_next", "linear_key_head_dim": -4}, "linear_key_head_dim must be"),
        ({"model_type": "jamba", "expert_layer_period": 0}, "'jamba'"),
        ({"model_type": "lfm2", "block_multiple_of": 0}, "block_multiple_of must be"),
        ({"model_type": "lfm2", "block_ffn_dim_multiplier": math.nan}, "block_ffn_dim_multiplier"),
        ({"model_type": "zamba2", "adapter_rank": 0, "layers_block_type": ["hybrid"]}, "adapter"),
    ],
)
def test_strange_configs_are_one_line(
    config: dict, message: str, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_SHAPE | {"num_hidden_layers": 1} | config))
    assert main(["plan", "--target", str(path), "--machine", "h200"]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("moesd")]
    assert not out and len(lines) == 1 and message in lines[0], err


def test_a_family_that_transformers_does_not_know_is_not_taken_for_attention(monkeypatch) -> None:
    """An older transformers: its layer types would be read from nowhere."""
    monkeypatch.delitem(CONFIG_MAPPING._mapping, "jamba")
    with pytest.raises(ValueError, match="no 'jamba': this version of transformers does not"):
        spec_from_config({"model_type": "jamba", **_SHAPE})
