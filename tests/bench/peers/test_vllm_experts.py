"""vLLM's ops for quantised experts: which formats, and each argument in its place."""

from __future__ import annotations

import sys

import pytest
import torch

from bench.peers.vllm_experts import METHODS, VllmExperts, _quantised_call
from bench.workloads.layer import make_layer
from bench.workloads.shapes import Shape


def test_vllm_runs_the_formats_that_it_computes_as_we_do():
    with pytest.raises(ValueError, match="plain, fp8_block, mxfp4; got int4"):
        VllmExperts("no-python", 1, "int4")


@pytest.mark.parametrize("name", METHODS)
def test_vllms_op_is_given_each_argument_in_its_place(name, monkeypatch):
    """Against the signature of vLLM 0.32's ``fused_experts_cpu``; the op itself is not here."""
    seen = {}
    order = ["out", "x", "w1", "w2", "weights", "ids", "method", "s1", "s2", "z1", "z2", "a1"]
    order += ["block", "b1", "b2", "alpha", "limit", "vnni"]

    class Ops:
        convert_weight_packed = staticmethod(lambda weight: ("packed", weight))
        convert_scale_packed = staticmethod(lambda scale: ("packed", scale))

        @staticmethod
        def fused_experts_cpu(*arguments):
            seen.update(zip(order, arguments, strict=True))

    shape, cpu = Shape(3, 2, 256, 128), torch.device("cpu")
    stored = make_layer(shape, torch.bfloat16, cpu, 0, name).stored
    monkeypatch.setitem(sys.modules, "vllm", type("vllm", (), {"_C": None}))
    monkeypatch.setitem(sys.modules, "vllm._C", object())
    monkeypatch.setattr(torch, "ops", type("ops", (), {"_C": Ops}))
    _quantised_call(stored, name)("out", "hidden", "weights", "ids")
    given = [seen[key] for key in ("out", "x", "weights", "ids")]
    assert given == ["out", "hidden", "weights", "ids"]
    assert seen["w1"] == ("packed", stored[0]) and seen["w2"] == ("packed", stored[1])
    assert (seen["method"], seen["block"]) == METHODS[name] and seen["vnni"] is True
    scale = seen["s2"] if name == "fp8_block" else seen["s2"][1]
    assert scale is stored.down_scale
    assert not any(seen[key] for key in ("z1", "z2", "a1", "b1", "b2", "alpha", "limit"))
