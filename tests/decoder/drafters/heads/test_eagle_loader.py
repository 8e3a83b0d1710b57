"""Reading EAGLE checkpoints: detection, canonical names, and errors that name the problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.eagle_reference import LAYER, H, norm, random_layer, save, split_files

from decoder.drafters.heads.eagle_loader import is_eagle_checkpoint, load_eagle


def eagle1_tensors() -> dict[str, torch.Tensor]:
    return random_layer("layers.0", H, 0) | {"fc.weight": torch.ones(H, 2 * H)}


def eagle3_tensors(draft_vocab: int = 8) -> dict[str, torch.Tensor]:
    return random_layer("midlayer", 2 * H, 0) | {
        "midlayer.hidden_norm.weight": norm(H, 1),
        "midlayer.input_layernorm.weight": norm(H, 2),
        "norm.weight": norm(H, 3),
        "fc.weight": torch.ones(H, 3 * H),
        "lm_head.weight": torch.ones(draft_vocab, H),
        "d2t": torch.arange(draft_vocab),
    }


def test_original_eagle1_is_told_from_a_llama_by_its_tensors(tmp_path: Path) -> None:
    config = {**LAYER, "architectures": ["LlamaForCausalLM"]}
    assert is_eagle_checkpoint(save(tmp_path / "head", config, eagle1_tensors()))
    llama = save(tmp_path / "llama", config, random_layer("model.layers.0", H, 0))
    assert not is_eagle_checkpoint(llama)
    assert not is_eagle_checkpoint(tmp_path / "nothing")


def test_a_plain_name_and_two_files_hold_an_eagle3_head(tmp_path: Path) -> None:
    config = {**LAYER, "architectures": ["LlamaForCausalLM"]}
    tensors = {f"model.{name}": tensor for name, tensor in eagle3_tensors().items()}
    whole = load_eagle(save(tmp_path / "one", config, tensors))
    split_files(save(tmp_path / "two", config, tensors))
    assert is_eagle_checkpoint(tmp_path / "two")
    found = load_eagle(tmp_path / "two")
    assert found.config == whole.config and found.weights.keys() == whole.weights.keys()
    next((tmp_path / "two").glob("*-2.safetensors")).unlink()
    for read in (is_eagle_checkpoint, load_eagle):
        with pytest.raises(ValueError, match=r"names 'model-2.safetensors', which is missing"):
            read(tmp_path / "two")


@pytest.mark.parametrize(
    "config",
    [
        {"speculators_model_type": "eagle3"},
        {**LAYER, "architectures": ["Eagle3Speculator"]},
        {**LAYER, "architectures": ["LlamaForCausalLMEagle3"]},
    ],
)
def test_detection_by_configuration(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert is_eagle_checkpoint(tmp_path)


def test_eagle3_is_canonical(tmp_path: Path) -> None:
    config = {**LAYER, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    checkpoint = load_eagle(save(tmp_path, config, eagle3_tensors()))
    assert checkpoint.config.kind == "eagle3"
    assert checkpoint.config.feature_layers is None  # depth of the target decides
    assert checkpoint.draft_to_target is not None
    assert checkpoint.draft_to_target.tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert "layers.0.hidden_norm.weight" in checkpoint.weights
    assert not any("midlayer" in name or name == "t2d" for name in checkpoint.weights)
    assert checkpoint.config.rope["rope_scaling"]["factor"] == 2.0


IDS = [1, 9, 40, 63]
MARKED = torch.zeros(64, dtype=torch.bool).scatter(0, torch.tensor([0, 2, 3]), True)
MAPS: dict[str, tuple[list[int], torch.Tensor | None, list[int]]] = {
    "offsets, some negative": ([3, 1, -2, 4], None, [3, 2, 0, 7]),
    "offsets over the whole vocabulary": ([0] * 64, None, list(range(64))),
    "ids, as no offset leads there": (IDS, None, IDS),
    "ids, as the mask says": ([0, 2, 3], MARKED, [0, 2, 3]),
    "offsets, as the mask says": ([0, 1, 1], MARKED, [0, 2, 3]),
}


@pytest.mark.parametrize(("d2t", "t2d", "expected"), MAPS.values(), ids=MAPS)
def test_what_a_map_of_tokens_holds(tmp_path: Path, d2t: Any, t2d: Any, expected: Any) -> None:
    tensors = eagle3_tensors(len(d2t)) | {"d2t": torch.tensor(d2t, dtype=torch.int32)}
    tensors |= {} if t2d is None else {"t2d": t2d}
    found = load_eagle(save(tmp_path, LAYER, tensors)).draft_to_target
    assert found is not None and found.tolist() == expected


def test_the_two_conventions_of_feature_layer_ids(tmp_path: Path) -> None:
    key = "eagle_aux_hidden_state_layer_ids"
    inputs = save(tmp_path / "a", {**LAYER, key: [2, 24, 45]}, eagle3_tensors())
    assert load_eagle(inputs).config.feature_layers == (2, 24, 45)
    nested = {**LAYER, "eagle_config": {key: [1, 23, 44]}}
    outputs = save(tmp_path / "b", nested, eagle3_tensors())
    assert load_eagle(outputs).config.feature_layers == (2, 24, 45)


def test_sliding_windows_follow_the_layer_types(tmp_path: Path) -> None:
    config = {**LAYER, "sliding_window": 9}
    assert load_eagle(save(tmp_path / "a", config, eagle1_tensors())).config.windows == (0,)
    config["layer_types"] = ["sliding_attention"]
    assert load_eagle(save(tmp_path / "b", config, eagle1_tensors())).config.windows == (9,)


def broken(change: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config: dict[str, Any] = dict(LAYER)
    tensors = eagle3_tensors()
    match change:
        case "no fc":
            del tensors["fc.weight"]
        case "no norm":
            del tensors["norm.weight"]
        case "no hidden size":
            del config["hidden_size"]
        case "heads":
            config["num_key_value_heads"] = 3
        case "shape":
            config["num_attention_heads"] = 8
        case "d2t":
            tensors["d2t"] = torch.arange(5)
        case "d2t missing":
            del tensors["d2t"]
        case "t2d":
            tensors["t2d"] = torch.arange(64) > 50
        case "another kind":
            config = {"speculators_model_type": "eagle", "transformer_layer_config": config}
        case "no mask token":
            config["parallel_drafting"] = True
        case "type":
            config = {"speculators_model_type": "mtp", "transformer_layer_config": config}
    return config, tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no fc", "no tensor named fc.weight"),
        ("no norm", "lacks tensor norm.weight"),
        ("no hidden size", "lacks hidden_size"),
        ("heads", "multiple of num_key_value_heads, got 4 and 3"),
        ("shape", r"q_proj.weight must be \(32, 64\)|k_proj.weight must be \(8, 64\)"),
        ("d2t", "got 8 and 5"),
        ("d2t missing", "lm_head covers 8 tokens but there is no d2t"),
        ("t2d", "d2t must lead to the 13 tokens that t2d marks, got other 8"),
        ("another kind", "says that it holds eagle, its tensors are those of eagle3"),
        ("no mask token", "needs mask_token_id or pard_token or ptd_token_id, got None"),
        ("type", "must be one of 'eagle', 'eagle3', 'peagle', got 'mtp'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: str, message: str) -> None:
    config, tensors = broken(change)
    with pytest.raises(ValueError, match=message):
        load_eagle(save(tmp_path, config, tensors))


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    with pytest.raises(ValueError, match=r"has no config.json"):
        load_eagle(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LAYER))
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor"):
        load_eagle(tmp_path)
