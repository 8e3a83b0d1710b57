"""What a plan counts of quantised weights is what they take once they are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.formats.checkpoints import SIZES, write_checkpoint
from support.tiny import tiny_model

from decoder.__main__ import build_parser
from decoder.cli.plan.inputs import build_model
from decoder.model.loading import load_model
from decoder.perf_model.config_spec import spec_from_config
from decoder.perf_model.model_spec import WEIGHT_BYTES, ModelSpec
from decoder.perf_model.presets import preset_config
from moesd_kernels import available_backends, quantize

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or available_backends()["cpu"] is not None,
    reason="such weights stay as they are on the CPU kernels",
)


def planned(path: Path, *flags: str) -> ModelSpec:
    args = ["plan", "--target", str(path), "--draft", "none", "--machine", "h200", *flags]
    return build_model(build_parser().parse_args(args))[0].target


def in_memory(path: Path) -> tuple[float, float]:
    """Bytes of matrices: of everything, and of experts; norms and biases are not counted."""
    model = load_model(path, packed=True, device="cpu")
    sizes = {
        name: parameter.nbytes
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and not name.endswith("bias")
    }
    return sum(sizes.values()), sum(sizes[name] for name in sizes if ".experts." in name)


def assert_as_in_memory(spec: ModelSpec, path: Path) -> None:
    total, experts = in_memory(path)
    counted = sum(x.num_experts * x.expert for x in spec.layers) * spec.expert_bytes
    assert counted == pytest.approx(experts, rel=1e-3)
    assert spec.weight_bytes == pytest.approx(total, rel=0.01)


def saved(folder: Path, *steps: dict[str, Any], **changes: Any) -> Path:
    model = tiny_model("qwen3_moe", torch.bfloat16, **SIZES | changes)
    for step in steps:
        quantize(model, **step)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "steps",
    [
        [{"weight_format": "int4"}],
        [{"weight_format": "int8", "group": None}],
        [{"weight_format": "int4", "group": 128, "linears": False}, {"weight_format": "int8"}],
        [{"weight_format": "int8", "linears": False}],
    ],
    ids=["int4", "rows", "both", "experts"],
)
def test_our_own_integers(tmp_path, steps, tied):
    assert_as_in_memory(planned(saved(tmp_path, *steps, tie_word_embeddings=tied)), tmp_path)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_is_not_packed_of_an_fp32_model_has_four_bytes(tmp_path, tied):
    folder = saved(tmp_path, {"weight_format": "int4"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied}
    specs = []
    for dtype in ("bfloat16", "float32"):
        (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        specs.append(planned(folder))
    half, whole = specs
    assert whole.kv_bytes == 4 and whole.expert_bytes == half.expert_bytes
    assert whole.dense_bytes > half.dense_bytes, "routers"


def test_experts_that_no_group_divides_stay_plain(tmp_path):
    folder = saved(tmp_path, {"weight_format": "int4"}, moe_intermediate_size=48)
    assert_as_in_memory(planned(folder), folder)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_published_formats(tmp_path, kind):
    folder = write_checkpoint(tmp_path, kind)
    spec = planned(folder)
    assert spec.expert_bytes == pytest.approx(WEIGHT_BYTES[kind])
    if kind == "mxfp4":
        assert spec.dense_bytes == 2
    else:
        assert_as_in_memory(spec, folder)
    assert planned(folder, "--dtype", "bf16").expert_bytes == 2


def test_a_configuration_alone_says_nearly_as_much(tmp_path):
    folder = saved(tmp_path, {"weight_format": "int4"})
    whole = planned(folder)
    (folder / "model.safetensors").unlink()
    alone = planned(folder)
    assert alone.weight_bytes == pytest.approx(whole.weight_bytes, rel=0.02)  # routers are plain
    gptq = preset_config("qwen3-30b-a3b").to_dict() | {
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}
    }
    assert spec_from_config(gptq).expert_bytes == 0.5 + 2 / 128


def compressed(*groups: dict[str, Any]) -> dict[str, Any]:
    named = {f"group_{index}": {"weights": weights} for index, weights in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "config_groups": named}


def says(folder: Path, **said: Any) -> Path:
    config = preset_config("mixtral-8x7b").to_dict() | {"quantization_config": said}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("said", "size"),
    [
        (compressed({"num_bits": 8, "type": "float", "group_size": None}), 1),
        (compressed({"num_bits": 4, "type": "int", "group_size": 32}), 1 / 2 + 2 / 32),
        (compressed({"num_bits": 4, "type": "float", "group_size": 16}), 1 / 2 + 1 / 16),
        (compressed({"num_bits": 8}, {"num_bits": 8, "group_size": -1}), 1),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 1 / 2 + 4 / 64),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, 1),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 1 / 2 + 1 / 16),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, 1),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 1 / 2 + 2 / 64),
    ],
)
def test_what_others_quantise_to(tmp_path, said, size):
    spec = planned(says(tmp_path, **said))
    assert spec.expert_bytes == size
    assert size < spec.dense_bytes < 2 and spec.embedding_bytes == 2, "head and embedding are plain"


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"quant_method": "hqq"}, "'hqq'"),
        (compressed({"num_bits": 8}, {"num_bits": 4}), "'compressed-tensors'"),
        (compressed(), "'compressed-tensors'"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "'MIXED_PRECISION'"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
    ],
)
def test_a_format_that_is_not_known_is_no_bf16(tmp_path, capsys, said, named):
    from decoder.__main__ import main

    folder = says(tmp_path, **said)
    assert main(["plan", "--target", str(folder), "--machine", "h200"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line and "are not known here" in line
    assert planned(folder, "--dtype", "int8").expert_bytes == WEIGHT_BYTES["int8"], "as it is asked"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "kinds",
    [
        {"": "q8_0"},
        {"_exps": "q4_k", "": "q8_0"},
        {"down_exps": "q6_k", "_exps": "q4_k", "": "q4_0"},
        {"gate_exps": "q8_0", "up_exps": "q4_0", "": "q4_0"},
    ],
    ids=["one", "experts", "down", "unpacked"],
)
def test_gguf_files(tmp_path, kinds, tied):
    pytest.importorskip("gguf", reason="the file is written with it")
    from support.formats import gguf_file

    file = gguf_file.write_gguf(tmp_path / "m.gguf", "qwen3moe", kinds, experts=4, tied=tied)
    assert_as_in_memory(planned(file), file)


def test_a_head_for_a_packed_target_is_not_packed(tmp_path):
    folder = saved(tmp_path, {"weight_format": "int4"})
    args = ["plan", "--target", str(folder), "--machine", "h200"]
    draft = build_model(build_parser().parse_args(args))[0].draft
    assert draft.dense_bytes == 2
    draft = build_model(build_parser().parse_args([*args, "--dtype", "int8"]))[0].draft
    assert draft.dense_bytes == WEIGHT_BYTES["int8"], "as it is asked for"


def test_what_a_configuration_may_say(tmp_path, capsys):
    from decoder.__main__ import main

    for said in ("fp8", {"quant_method": "moesd", "steps": 3}, {"bits": "four"}, [1]):
        config = json.loads((saved(tmp_path) / "config.json").read_text())
        config["quantization_config"] = said
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert main(["plan", "--target", str(tmp_path), "--machine", "h200"]) in (0, 2)
        assert "Traceback" not in capsys.readouterr().err
