"""The fused-MoE peer: what is taken from a user's file, and its calls against the reference.

The peer's own source is not needed: ``fake_vllm`` has functions of the same names and arguments.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.peers.fused_moe_triton import TAKEN, FusedMoeTriton, fused_moe_peers
from bench.workloads.shapes import Shape

HERE = Path(__file__).parent
FAKE = HERE / "fake_vllm"
TUNED, UNTUNED = Shape(6, 2, 24, 20), Shape(40, 4, 40, 36)
BF16 = torch.bfloat16


def test_calls_are_right_up_to_rounding():
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(HERE / "fused_moe_child.py"), str(FAKE)],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 20
    for line in lines:
        assert line["error"] <= 4 * line["eps"], line


def test_tiles_are_those_of_the_nearest_tuned_number_of_tokens_else_the_default():
    peer = FusedMoeTriton(FAKE, "NVIDIA_H200")
    sizes = [peer.config(TUNED, tokens, BF16)["BLOCK_SIZE_M"] for tokens in (1, 8, 9, 500)]
    assert sizes == [2, 2, 8, 8]
    assert peer.config(UNTUNED, 9, BF16) == {"BLOCK_SIZE_M": 16}
    assert not peer.is_tuned(TUNED, torch.float32)  # another file, which is not there
    assert peer.describe(TUNED, 9, BF16).keys() == {"source", "tuned", "BLOCK_SIZE_M"}


@pytest.mark.parametrize(
    ("device_name", "major", "shape", "names"),
    [
        ("NVIDIA H200", 9, TUNED, ["vllm_triton"]),
        ("NVIDIA H100 80GB HBM3", 9, TUNED, ["vllm_triton", "vllm_triton_h200"]),
        ("NVIDIA H100 80GB HBM3", 9, UNTUNED, ["vllm_triton"]),
        ("NVIDIA A100-SXM4-80GB", 8, TUNED, ["vllm_triton"]),  # has less shared memory
    ],
)
def test_an_h200s_tiles_are_tried_where_hopper_has_none(
    monkeypatch, device_name, major, shape, names
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: device_name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert list(fused_moe_peers(FAKE, shape, BF16, torch.device("cuda"))) == names


def test_a_folder_without_the_file_says_what_it_must_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold vLLM's fused_moe.py and configs/"):
        FusedMoeTriton(tmp_path, "NVIDIA_H200")


@pytest.mark.parametrize("name", TAKEN)
def test_another_version_of_the_file_says_what_it_lacks(tmp_path, name):
    text = (FAKE / "fused_moe.py").read_text().replace(f"def {name}(", "def renamed(")
    (tmp_path / "fused_moe.py").write_text(text)
    with pytest.raises(ValueError, match=rf"must define {name}; known is vLLM"):
        FusedMoeTriton(tmp_path, "NVIDIA_H200")
