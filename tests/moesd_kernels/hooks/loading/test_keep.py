"""Checkpoints in FP8 and MXFP4 stay as they are stored, and are what transformers unpacks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.formats.checkpoints import FP8, SIZES, as_fp8, rewritten, write_checkpoint
from support.tiny import tiny_model
from transformers import AutoModelForCausalLM

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import build_drafter
from decoder.model.loading import load_model
from moesd_kernels import accelerate, available_backends, keep_quantized
from moesd_kernels.formats import dequantize
from moesd_kernels.hooks.experts import spec_of
from moesd_kernels.hooks.packed import scale_of

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or available_backends()["cpu"] is not None,
    reason="only a machine without a GPU unpacks such checkpoints; the CPU kernels must run",
)
IDS = torch.arange(14).view(2, 7)


@pytest.fixture(scope="module", params=["fp8", "mxfp4"])
def checkpoint(request: Any, tmp_path_factory: Any) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, write_checkpoint(folder, request.param)


def load(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, trust_remote_code=False, attn_implementation="eager"
    )
    return model.eval()


@torch.no_grad()
def test_kept_is_unpacked_with_less_memory(checkpoint: tuple[str, Path]) -> None:
    pytest.importorskip("accelerate")  # transformers unpacks with it
    kind, folder = checkpoint
    unpacked = load(folder)
    with keep_quantized():
        kept = load(folder)
    sizes = [sum(p.nbytes for p in m.parameters()) for m in (kept, unpacked)]
    assert sizes[0] < 1.1 * (folder / "model.safetensors").stat().st_size < 0.9 * sizes[1]
    ours, theirs = (m.model.layers[0].mlp.experts for m in (kept, unpacked))
    stored = spec_of(ours).stored
    for name in ("gate_up_proj", "down_proj"):
        scale = scale_of(ours, name, stored)
        values = dequantize(getattr(ours, name), scale, stored.weight_format, torch.bfloat16)
        wanted = getattr(theirs, name)
        if kind == "mxfp4":
            assert torch.equal(values, wanted.mT)
        else:  # one rounding here, there the scale is rounded first
            torch.testing.assert_close(values, wanted, rtol=2**-7, atol=0)
    assert_alike(accelerate(kept)(IDS).logits, unpacked(IDS).logits)


def assert_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for roundings of bf16 on the way, which a router may amplify for single tokens."""
    error = (actual.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    assert error.median() < 0.02, error


def test_speculative_outputs_are_the_models_own(checkpoint: tuple[str, Path]) -> None:
    model = load_model(checkpoint[1], packed=True)
    assert any(p.dtype in (torch.uint8, torch.float8_e4m3fn) for p in model.parameters())

    def outputs(drafter: Any, gamma: int) -> list[list[int]]:
        decoder = SpeculativeDecoder(model, drafter, gamma, max_batch_size=2, max_length=64)
        lean = decoder.runner._lean
        assert lean is not None and lean.whole if checkpoint[0] == "fp8" else lean is None
        prompts = [[1, 2, 3], [9, 8]]
        greedy = SamplingParams(max_new_tokens=12, ignore_eos=True)
        return [output.token_ids for output in decoder.generate(prompts, greedy)]

    assert outputs(build_drafter("ngram", model), 3) == outputs(None, 0)


def test_outside_the_block_nothing_has_changed(checkpoint: tuple[str, Path]) -> None:
    pytest.importorskip("accelerate")
    _, folder = checkpoint
    with keep_quantized():
        pass
    assert all(p.dtype == torch.bfloat16 for p in load(folder).parameters())
    with keep_quantized(others=False):
        assert all(p.dtype == torch.bfloat16 for p in load(folder).parameters())


def test_squares_that_are_not_ours_are_said(tmp_path: Path) -> None:
    """The model is left as it was found."""
    model = tiny_model("qwen3_moe", torch.bfloat16, **SIZES)
    model.save_pretrained(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "fp8")

    def halved(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        found = as_fp8(name, tensor)
        scale = f"{name}_scale_inv"
        if scale in found:
            rows, columns = (size // 64 for size in tensor.shape)
            found[scale] = torch.ones(rows, columns)
        return found

    folder = rewritten(tmp_path / "fp8", FP8 | {"weight_block_size": [64, 64]}, halved)
    with keep_quantized():
        kept = load(folder)
    with pytest.raises(NotImplementedError, match="FP8Experts: its FP8 weights have no scale"):
        accelerate(kept)
    assert not any("forward" in vars(module) for module in kept.modules())
