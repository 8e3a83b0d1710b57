"""Feed-forward blocks of transformers' families, each as its real model has them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from decoder.__main__ import main
from decoder.perf_model.config_spec import spec_from_config

# Left out: indexers, gates of norms, heads of another width in some layers, learned positions.
_ROUGHLY = {
    "axk2": 0.01, "dots3_note_text": 0.005, "mimo_v2_flash": 0.003, "biogpt": 0.005,
    "modernbert-decoder": 0.005,
}  # fmt: skip
_REFUSED = ("longcat_flash", "jetmoe", "deepseek_v4", "bert")


def made(make: Callable[[], Any]) -> Any:
    """What a family's own defaults make, if anything."""
    with suppress(Exception):
        return make()


def test_every_family_of_transformers_is_counted_or_refused() -> None:
    wrong, counted = {}, 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = made(lambda kind=kind: AutoConfig.for_model(kind))
        if (
            not config
            or config.get_text_config(decoder=True) is not config
            or hasattr(config, "vision_config")
        ):
            continue  # the real one sees or hears besides
        try:
            spec = spec_from_config(config)
        except (ValueError, NotImplementedError):  # refused; anything else is a fault
            continue
        with torch.device("meta"):
            model = made(lambda config=config: AutoModelForCausalLM.from_config(config))
        if model is None:
            continue
        ratio = spec.total_params / sum(p.numel() for p in model.parameters())
        counted += 1
        if abs(ratio - 1) > _ROUGHLY.get(kind, 0.002):
            wrong[kind] = ratio
    assert not wrong
    assert counted > 40


@pytest.mark.parametrize("kind", _REFUSED)
def test_what_would_be_miscounted_is_refused(kind: str, tmp_path, capsys) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    config = AutoConfig.for_model(kind)
    with pytest.raises(NotImplementedError, match=f"layers of '{kind}'"):
        spec_from_config(config)
    config.save_pretrained(tmp_path)
    assert main(["plan", "--target", str(tmp_path), "--machine", "h200"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert kind in line


def test_experts_and_shared_ones_of_every_name() -> None:
    fields = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 500,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    aria = spec_from_config(AutoConfig.for_model("aria_text", **fields))
    assert aria.moe is not None and (aria.moe.num_experts, aria.moe.top_k) == (8, 2)
    assert aria.moe.dense == 2 * 3 * 64 * 96 + 8 * 64
    more = {"moe_num_experts": 8, "moe_intermediate_size": 32, "moe_layer_start_index": 2}
    ernie = spec_from_config(AutoConfig.for_model("ernie4_5_moe", **fields, **more))
    assert [layer.num_experts for layer in ernie.layers] == [0, 0, 8, 8]
    more = {"num_local_experts": 8, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 128}
    llama = spec_from_config(AutoConfig.for_model("llama4_text", **fields, **more))
    assert [layer.num_experts for layer in llama.layers] == [0, 8, 0, 8]
    assert [layer.dense for layer in llama.layers[:2]] == [3 * 64 * 128, 3 * 64 * 96 + 8 * 64]
    more = {"num_experts": 8, "moe_topk": [1, 2, 3, 4], "moe_intermediate_size": [96] * 4}
    hunyuan = spec_from_config(AutoConfig.for_model("hunyuan_v1_moe", **fields, **more))
    assert [(layer.num_experts, layer.top_k) for layer in hunyuan.layers] == [
        (8, k) for k in (1, 2, 3, 4)
    ]
