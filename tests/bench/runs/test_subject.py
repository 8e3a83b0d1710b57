"""The draft of a measurement runs as it would in a decoder of its own, one batch after another."""

import pytest
import torch
from support.tiny import tiny_model

from bench.runs.subject import Subject, drafter_for, logged_decoder
from moesd_kernels import available_backends, quantize

pytestmark = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason="the CPU kernels cannot run here"
)


@pytest.mark.parametrize("alpha", [None, 0.9])
@pytest.mark.parametrize("weight_format", [None, "int8"])
def test_a_draft_runs_lean_in_every_decoder(weight_format, alpha):
    target = tiny_model("qwen3_moe", torch.bfloat16)
    draft = tiny_model("qwen3", torch.bfloat16, hidden_size=64, head_dim=32)
    if weight_format is not None:
        quantize(draft, weight_format)
    subject = Subject(target, draft, alpha)
    for batch in (2, 9):
        drafter = drafter_for(subject)
        logged_decoder(subject, drafter, batch, 64, 3)
        assert (drafter if alpha is None else drafter.cost).runner._lean is not None, batch
