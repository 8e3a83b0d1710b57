"""A measurement with experts in files, and what it says of reading them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.offload import expert_bytes, saved

from bench.measure.storage import bytes_from_storage
from bench.runs.decode import measure_batch
from bench.runs.subject import Subject
from bench.workloads.offloaded import offloaded_model
from decoder.offload import store_of


def test_a_measurement_says_what_was_read(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3_moe", torch.float32)
    target = offloaded_model(str(tmp_path), torch.float32, 0.6)
    store = store_of(target)
    assert store is not None
    assert 8 <= store.places < 16
    (pair,) = measure_batch(
        Subject(target, None, alpha=0.9), 2, [3], prompt_tokens=4, new_tokens=8, repetitions=1
    )
    assert pair.identical
    for said in (pair.offload_ar, pair.offload_spec):
        assert said is not None
        read = said["experts_missed"] + said["experts_prefetched"]
        assert said["bytes_read"] == read * expert_bytes(tmp_path) > 0
        assert said["rounds"] > 0
    with pytest.raises(ValueError, match="run as it is"):
        offloaded_model(str(tmp_path), torch.float32, 0.6, top_k=2)


def test_bytes_from_storage_are_counted() -> None:
    before = bytes_from_storage()
    if before is None:
        pytest.skip("this kernel does not count them")
    assert before >= 0
