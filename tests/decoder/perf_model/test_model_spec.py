"""Parameter counts from configs: published totals, and real (meta or tiny) models."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from decoder.perf_model.config_spec import spec_from_config
from decoder.perf_model.model_spec import ModelSpec, eagle_spec
from decoder.perf_model.presets import (
    _PRESETS,
    is_preset,
    paper_draft_spec,
    preset_config,
    preset_names,
    preset_spec,
)


def real_parameters(config) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mixtral-8x7b", 46.7e9, 12.9e9),
        ("qwen2-57b-a14b", 57.4e9, 14.2e9),
        ("qwen3-30b-a3b", 30.5e9, 3.35e9),  # published as 3.3B
        ("qwen3-235b-a22b", 235e9, 22.2e9),
        ("olmoe", 6.92e9, 1.28e9),
        ("deepseek-v3", 671e9, 37.5e9),
        ("deepseek-v2-lite", 15.7e9, 2.66e9),
        ("gpt-oss-120b", 116.8e9, 5.7e9),
        ("gpt-oss-20b", 20.9e9, 4.2e9),
        ("llama-3.1-8b", 8.03e9, 8.03e9),
        ("opt-30b", 29.97e9, 29.97e9),
        ("qwen3-next-80b-a3b", 79.7e9, 3.87e9),  # published as 80B and 3B, embeddings apart
        ("qwen3.5-35b-a3b", 34.7e9, 3.45e9),
        ("kimi-linear-48b-a3b", 49.1e9, 3.48e9),
        ("granite-4.0-h-small", 32.2e9, 8.8e9),
        ("nemotron-3-nano-30b-a3b", 31.6e9, 3.58e9),
        ("lfm2-8b-a1b", 8.34e9, 1.56e9),
    ],
)
def test_published_totals(name: str, total: float, active: float) -> None:
    if _PRESETS[name][0] not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {_PRESETS[name][0]}")
    spec = preset_spec(name)
    assert spec.total_params == pytest.approx(total, rel=0.004)
    assert spec.active_params == pytest.approx(active, rel=0.006)


@pytest.mark.parametrize("name", ["qwen2-57b-a14b", "deepseek-v2-lite", "gpt-oss-20b", "opt-350m"])
def test_presets_agree_with_the_real_architecture(name: str) -> None:
    """Full-size models without storage: every matrix is counted."""
    assert preset_spec(name).total_params == pytest.approx(
        real_parameters(preset_config(name)), rel=0.002
    )


_SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 1000,
    "num_attention_heads": 8, "num_key_value_heads": 2,
}  # fmt: skip
_MOE = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 64}),
        ("opt", {"ffn_dim": 512, "word_embed_proj_dim": 128, "max_position_embeddings": 128}),
        ("mixtral", {"num_local_experts": 8}),
        ("qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 256, "mlp_only_layers": [0]}),
        ("qwen3_moe", {**_MOE, "decoder_sparse_step": 2, "head_dim": 32}),
        ("olmoe", {"num_experts": 8, "num_experts_per_tok": 2}),
        ("gpt_oss", {"num_local_experts": 8, "head_dim": 32}),
        (
            "deepseek_v3",
            {
                "n_routed_experts": 16, "moe_intermediate_size": 64, "n_shared_experts": 2,
                "first_k_dense_replace": 2, "q_lora_rank": 64, "kv_lora_rank": 32,
                "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
                "num_key_value_heads": 8,
            },
        ),
    ],
)  # fmt: skip
def test_small_models_of_many_families(kind: str, fields: dict) -> None:
    config = AutoConfig.for_model(kind, **(_SMALL | fields))
    spec = spec_from_config(config)
    # norms, router biases and attention sinks are left out: under 1 % even at this size
    assert spec.total_params == pytest.approx(real_parameters(config), rel=0.01)
    from_json = spec_from_config(config.to_dict())
    assert from_json.total_params == spec.total_params


def test_sparse_layers_follow_the_config() -> None:
    spec = spec_from_config(
        AutoConfig.for_model("qwen3_moe", **_SMALL, **_MOE, decoder_sparse_step=2)
    )
    assert [layer.num_experts for layer in spec.layers] == [0, 16, 0, 16]
    dense_first = preset_spec("deepseek-v3")
    assert [layer.num_experts for layer in dense_first.layers[:5]] == [0, 0, 0, 256, 256]


def test_kv_cache_bytes() -> None:
    """GQA: layers x 2 x kv heads x head dim x 2 bytes; MLA: latent rank + rope; windows cap."""
    assert preset_spec("qwen3-30b-a3b").kv_cache_bytes(1) == 48 * 2 * 4 * 128 * 2
    assert preset_spec("deepseek-v3").kv_cache_bytes(10) == 61 * (512 + 64) * 2 * 10
    oss = preset_spec("gpt-oss-20b")
    assert oss.kv_cache_bytes(1128) == 12 * 2 * 8 * 64 * 2 * (1128 + 128)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    "stored", [{}, {"quantization_config": {"quant_method": "gptq", "bits": 4}}]
)
def test_caches_are_kept_in_what_numbers_are_that_are_not_packed(name: str, stored: dict) -> None:
    fields = {"model_type": "llama", **_SMALL, **stored}
    half, whole = (spec_from_config({**fields, name: x}) for x in ("bfloat16", "float32"))
    assert whole.kv_cache_bytes(10) == 2 * half.kv_cache_bytes(10) == 4 * 4 * 2 * 2 * 32 * 10
    assert (half.products, whole.products) == ("bf16", "fp32")
    assert eagle_spec(whole).kv_bytes == 4
    assert ModelSpec.from_json(whole.to_json()).products == "fp32"


def test_bytes_follow_the_storage() -> None:
    assert preset_spec("gpt-oss-120b").weight_bytes == pytest.approx(65e9, rel=0.03)  # mxfp4
    assert preset_spec("mixtral-8x7b").weight_bytes == pytest.approx(93.4e9, rel=0.01)
    fp8 = preset_config("qwen3-30b-a3b").to_dict() | {
        "quantization_config": {"quant_method": "fp8"}
    }
    # Embedding and head stay in bf16, 0.31e9 numbers each.
    assert spec_from_config(fp8).weight_bytes == pytest.approx(31.15e9, rel=0.003)


def test_a_model_that_also_sees_is_stored_as_its_whole_says() -> None:
    whole = {
        "model_type": "qwen3_vl_moe",
        "text_config": {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 512},
        "quantization_config": {"quant_method": "fp8"},
    }
    assert spec_from_config(whole).expert_bytes < 1.1


def test_top_k_and_json_round_trip() -> None:
    spec = preset_spec("deepseek-v2-lite")
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert spec.with_top_k(2).active_params < spec.active_params
    with pytest.raises(ValueError, match="top_k 65 does not fit deepseek-v2-lite, which has 64"):
        spec.with_top_k(65)
    with pytest.raises(ValueError, match="has no experts"):
        preset_spec("opt-30b").with_top_k(2)


def test_drafts_of_the_paper() -> None:
    assert paper_draft_spec("qwen2-57b-a14b").total_params == pytest.approx(0.494e9, rel=0.01)
    head = paper_draft_spec("mixtral-8x7b")
    assert len(head.layers) == 1 and head.moe is None
    assert eagle_spec(preset_spec("olmoe")).vocab == 50304


def test_names() -> None:
    assert is_preset("Qwen/Qwen3-30B-A3B") and is_preset("mistralai/Mixtral-8x7B-Instruct-v0.1")
    assert len(preset_names()) >= 14
    with pytest.raises(ValueError, match=r"unknown preset 'opt-31b'; did you mean .*opt-30b"):
        preset_config("opt-31b")


def test_refusals() -> None:
    with pytest.raises(ValueError, match="config must have hidden_size or n_embd"):
        spec_from_config({"num_hidden_layers": 1})
    with pytest.raises(ValueError, match="num_hidden_layers must be at most 2048, got 1000000000"):
        spec_from_config({"model_type": "llama", "num_hidden_layers": 10**9})
    with pytest.raises(ValueError, match="describes no 'llama'"):
        spec_from_config({"model_type": "llama", "num_attention_heads": 0})
    with pytest.raises(ValueError, match="describes no 'llama'"):
        spec_from_config({"model_type": "llama", "hidden_size": "32"})
    with pytest.raises(ValueError, match="num_hidden_layers must be a positive integer, got '4'"):
        spec_from_config({"num_hidden_layers": "4"})
    with pytest.raises(ValueError, match="must be a transformers config or a dict"):
        spec_from_config(3)


@pytest.mark.parametrize(
    ("named", "name"),
    [("/a/b/target-1", "target-1"), ("Org/Model", "Org/Model"), ("", "llama"), ("here", "here")],
)
def test_a_model_read_from_a_folder_is_called_by_its_name_alone(named, name):
    fields = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 99}
    fields |= {"num_attention_heads": 4, "intermediate_size": 128, "_name_or_path": named}
    assert spec_from_config(fields).name == name
    assert spec_from_config(fields, "given").name == "given"
