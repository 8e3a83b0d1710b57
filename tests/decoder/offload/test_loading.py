"""Models that are loaded without their experts: what they decode, hold, and refuse."""

from __future__ import annotations

import copy
import ctypes
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build
from support.hostile.folders import copied, renamed, tensors, without
from support.offload import PAGES, expert_bytes, experts_bytes, fused, places, saved
from support.tiny import random_prompts, save_tokenizer, tiny_model

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import build_drafter
from decoder.drafters.replay import ReplayDrafter
from decoder.errors import RequestFailed, UserError
from decoder.model.loading import load_model
from decoder.offload import Offload, store_of

PROMPTS = random_prompts(4, seed=5)
FAMILIES = ("mixtral", "qwen3_moe")  # one tensor per expert: w1, w3, w2, and gate, up, down
NEW = SamplingParams(max_new_tokens=10, ignore_eos=True)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("offload")
    return {
        (family, name): saved(root / f"{family}-{name}", family, dtype)
        for family in FAMILIES
        for name, dtype in DTYPES.items()
    }


@pytest.fixture(scope="module")
def folder(folders: dict[tuple[str, str], Path]) -> Path:
    return folders["qwen3_moe", "fp32"]


def decoded(model: Any, drafter: Any = None, **options: Any) -> tuple[Any, SpeculativeDecoder]:
    """Outputs of three rows for four prompts, so that a row is used again."""
    made = drafter if isinstance(drafter, ReplayDrafter) else build_drafter(drafter, model)
    gamma = 0 if drafter is None else 3
    decoder = SpeculativeDecoder(model, made, gamma, max_batch_size=3, max_length=40, **options)
    return [list(o.token_ids) for o in decoder.generate(PROMPTS, NEW)], decoder


def drafters(outputs: list[list[int]]) -> list[Any]:
    recorded = zip(map(tuple, PROMPTS), outputs, strict=True)
    return [None, "ngram", "self", ReplayDrafter(0.8, dict(recorded))]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_the_whole_model(folders, family, name):
    """With the least budget, half of the experts, and all; of what fits all is read once."""
    folder = folders[family, name]
    wanted, _ = decoded(load_model(folder, device="cpu"))
    for count in (8, 11, 16):
        model = load_model(folder, device="cpu", offload=places(folder, count))
        for drafter in drafters(wanted):
            outputs, decoder = decoded(model, drafter)
            stats = decoder.stats.offload
            assert outputs == wanted
            assert stats is not None
            assert stats.bytes_read == (stats.missed + stats.prefetched) * expert_bytes(folder)
            if drafter is None:
                assert stats.needed > stats.missed > 0 or count == 16
            elif count == 16:  # the first run, its probe and what it drafts have read them all
                assert stats.bytes_read == 0


@pytest.mark.parametrize("layout", ["fused", "sharded", "elsewhere"])
def test_layouts_of_files(folder, tmp_path, layout):
    wanted, _ = decoded(load_model(folder, device="cpu"))
    offload = places(folder, 9)
    source = folder
    if layout == "fused":
        source = fused(folder, tmp_path / "fused", "qwen3_moe", torch.float32)
    elif layout == "sharded":
        model = tiny_model("qwen3_moe", **PAGES)
        model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
        source = tmp_path / "sharded"
        assert len(list(source.glob("*.safetensors"))) > 3
    else:
        offload = Offload(offload.budget, str(copied(folder, tmp_path / "copy")))
    assert decoded(load_model(source, device="cpu", offload=offload))[0] == wanted


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "qwen2_moe", "phimoe", "granitemoe"])
def test_families(tmp_path, family):
    """Biases, interleaved and transposed weights, dense layers, shared experts, other names."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    wanted, _ = decoded(load_model(tmp_path, device="cpu"))
    offload = Offload(10**9)
    assert decoded(load_model(tmp_path, device="cpu", offload=offload))[0] == wanted


def test_experts_in_double_precision(tmp_path):
    tiny_model("qwen3_moe", torch.float64).save_pretrained(tmp_path)
    wanted, _ = decoded(load_model(tmp_path, device="cpu"))
    assert decoded(load_model(tmp_path, device="cpu", offload=Offload(10**9)))[0] == wanted


def test_the_text_part_of_a_model_that_also_sees(tmp_path):
    """Whose configuration has that of the text in it."""
    build("Qwen3_5MoeForConditionalGeneration").save_pretrained(tmp_path)
    wanted, _ = decoded(load_model(tmp_path, device="cpu"))
    assert decoded(load_model(tmp_path, device="cpu", offload=Offload(10**9)))[0] == wanted


def test_a_decoder_from_paths(folder, tmp_path):
    own = copied(folder, tmp_path / "model")
    save_tokenizer(own, [f"w{index}" for index in range(64)])
    wanted, _ = decoded(load_model(own, device="cpu"))
    options = {"device": "cpu", "max_batch_size": 3, "max_length": 40, "gamma": 2}
    decoder = SpeculativeDecoder.from_paths(own, offload=places(folder, 9), **options)
    assert [list(o.token_ids) for o in decoder.generate(PROMPTS, NEW)] == wanted
    assert decoder.stats.as_dict()["offload"]["bytes_read"] > 0


def test_transformers_own_experts_are_offloaded_too(folder):
    plain, apart = (
        load_model(folder, device="cpu", experts="batched_mm", offload=offload)
        for offload in (None, places(folder, 9))
    )
    wanted, _ = decoded(plain, kernels=False)
    assert decoded(apart, "ngram", kernels=False)[0] == wanted


def resident_bytes(reset: bool = False) -> int:
    """Of this process: now, from where the peak is counted again, or at that peak."""
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # or what is free already would be used unseen
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pytest.skip("this kernel does not count a peak anew")
    field = "VmRSS" if reset else "VmHWM"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def test_memory_stays_within_the_budget(folder, tmp_path):
    """Loading and decoding; the whole model, which must show, takes all its experts."""
    decoded(load_model(folder, device="cpu", offload=places(folder, 9)))  # code takes memory, too
    sizes = {"hidden_size": 128, "moe_intermediate_size": 512, "num_experts": 64}
    config = {**PAGES, **sizes}
    tiny_model("qwen3_moe", torch.bfloat16, **config).save_pretrained(tmp_path)
    whole = experts_bytes(tmp_path)
    grown = {}
    for offload in (Offload(int(0.6 * whole)), None):
        before = resident_bytes(reset=True)
        model = load_model(tmp_path, device="cpu", offload=offload)
        decoded(model)
        grown[offload is None] = resident_bytes() - before
        del model
    assert grown[True] > 0.9 * whole
    assert grown[False] < 0.8 * whole


def test_decoders_in_two_threads_share_a_model(folder):
    """With places for one layer, each would lose its experts to the other in mid-layer."""
    model = load_model(folder, device="cpu", offload=places(folder, 8))
    wanted, first = decoded(model)
    _, second = decoded(model)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(decoder.generate, PROMPTS, NEW) for decoder in (first, second)]
    for outputs in both:
        assert [list(o.token_ids) for o in outputs.result()] == wanted


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def stored_as(part: str, dtype: torch.dtype) -> Any:
    def change(held: dict[str, Any]) -> dict[str, Any]:
        return {n: t.to(dtype) if part in n else t for n, t in held.items()}

    return tensors(change)


SPOILED = {
    "cut off": (cut, "cannot read"),
    "one expert is missing": (without("1.mlp.experts.3.up_proj"), "missing: "),
    "one projection is missing": (without("1.mlp.experts.3."), "missing: "),
    "all of a layer are missing": (without("1.mlp.experts."), "have no "),
    "other names": (renamed("experts.", "sages."), "have no "),
    "another type": (stored_as(".experts.", torch.bfloat16), "BF16"),
    "another type of a projection": (stored_as("down_proj", torch.float16), "F16"),
    "no router": (without("mlp.gate.weight"), "missing: "),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_spoiled_files_are_refused_before_anything_is_read(folder, tmp_path, fault):
    change, said = SPOILED[fault]
    spoiled = copied(folder, tmp_path / "model")
    change(spoiled)
    with pytest.raises(UserError, match=said) as caught:
        load_model(spoiled, device="cpu", offload=places(folder, 9))
    assert str(caught.value).isprintable()


def test_a_folder_of_experts_must_be_the_models(folders, folder, tmp_path):
    other = saved(tmp_path / "other", "qwen3_moe", torch.float32, num_experts=4)
    for elsewhere, said in (
        (other, "needs 8 of .*, got 4 in the files"),
        (folders["qwen3_moe", "bf16"], "lies in the files as BF16"),
        (tmp_path, "neither model.safetensors nor"),
    ):
        with pytest.raises(UserError, match=said):
            load_model(folder, device="cpu", offload=Offload(10**9, elsewhere))


def test_what_cannot_be_offloaded_is_refused(folder, tmp_path):
    dense = tmp_path / "dense"
    tiny_model("llama").save_pretrained(dense)
    quantized = copied(folder, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (quantized / "config.json").write_text(json.dumps(config))
    everything = Offload(10**9)
    with pytest.raises(UserError, match=r"must be an integer, got 8000000000\.0"):
        Offload(8e9)  # type: ignore[arg-type]
    for path, options, said in (
        (dense, {}, "LlamaForCausalLM has no routed experts to offload"),
        (quantized, {}, "quantised"),
        (folder, {"dtype": "bf16"}, "expected the model in that type, got torch.bfloat16"),
        (folder, {"offload": places(folder, 7)}, "must be at least"),
    ):
        with pytest.raises(UserError, match=said):
            load_model(path, device="cpu", **{"offload": everything, **options})


def test_a_model_that_holds_no_experts_is_not_saved_or_copied(folder, tmp_path):
    model = load_model(folder, device="cpu", offload=places(folder, 9))
    for act in (model.state_dict, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(UserError, match="in their files alone"):
            act()
    with pytest.raises(UserError, match="cannot be copied"):
        copy.deepcopy(model)
    converted = model.to(torch.bfloat16)
    with pytest.raises(UserError, match="moved, converted or replaced"):
        converted(input_ids=torch.tensor([[1, 2]]))


def test_a_file_that_changes_ends_the_requests_concerned(folder, tmp_path):
    """All of these need a read."""
    own = copied(folder, tmp_path / "model")
    model = load_model(own, device="cpu", offload=places(folder, 8))
    _, decoder = decoded(model)
    with (own / "model.safetensors").open("r+b") as opened:
        start = opened.read(8)
        opened.seek(0)
        opened.write(start)
    with pytest.raises(RequestFailed, match="has changed since the model was loaded") as caught:
        decoder.generate(PROMPTS, NEW)
    assert [o.error is not None for o in caught.value.outputs] == [True] * len(PROMPTS)


def test_an_interrupted_run_can_go_on(folder, monkeypatch):
    model = load_model(folder, device="cpu", offload=places(folder, 8))
    wanted, decoder = decoded(model)
    store = store_of(model)
    assert store is not None
    bring, calls = type(store)._bring, iter(range(100))

    def interrupted(self: Any, *args: Any) -> None:
        bring(self, *args)
        if next(calls) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(type(store), "_bring", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.generate(PROMPTS, NEW)
    assert [list(o.token_ids) for o in decoder.generate(PROMPTS, NEW)] == wanted
