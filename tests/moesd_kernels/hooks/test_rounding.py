"""An accelerated model is no further from fp32 than the model itself, in bf16, in every family.

A kernel that rounds once more than the module in whose place it runs shows here, whichever module
that is. The distance is that of a token's logits; the geometric mean over tokens is what hardly
moves where a router that was close to a tie falls the other way for some of them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from support.families import FAMILY_NAMES, FIRST_ORDINARY, VOCAB, build
from support.tiny import randomize
from torch import Tensor

from moesd_kernels import accelerate
from moesd_kernels.dense import ops

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))

SEEDS, MOST_SEEDS = 2, 12  # more where few leave it open, as routers' ties do
FURTHER = 1.05


def logits(model, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


def log_distance(actual: Tensor, exact: Tensor) -> Tensor:
    """Logarithm of each token's root mean square distance."""
    return (actual - exact).square().mean(-1).clamp_min(1e-24).log() / 2


@pytest.mark.parametrize("name", FAMILY_NAMES)
@torch.no_grad()
def test_distance_from_fp32(name):
    model = build(name)
    further: list[Tensor] = []
    for seed in range(MOST_SEEDS):
        if seed >= SEEDS and torch.stack(further).mean().exp() <= FURTHER:
            return
        randomize(model, seed)
        own = copy.deepcopy(model).bfloat16()
        exact = copy.deepcopy(own).float()
        ids = torch.randint(
            FIRST_ORDINARY, VOCAB, (6, 20), generator=torch.Generator().manual_seed(seed)
        )
        reference = logits(exact, ids)
        try:
            before = log_distance(logits(own, ids), reference)
        except RuntimeError as error:
            pytest.skip(f"does not run in bf16 by itself: {error}")
        after = log_distance(logits(accelerate(own), ids), reference)
        further.append(after - before)
    ratio = torch.stack(further).mean().exp().item()
    assert ratio <= FURTHER, f"accelerated, {name} is {ratio:.3f} times as far from fp32"
