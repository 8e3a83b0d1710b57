"""Routers that compute in a way of their own: every token as if it were alone."""

from __future__ import annotations

import inspect

import pytest
import torch
from support.families import FAMILY_NAMES, build

from moesd_kernels import accelerate
from moesd_kernels.hooks.products import with_our_products
from moesd_kernels.hooks.shadow import shadow_of

FAMILIES = (
    *("HYV3ForCausalLM", "InklingForCausalLM", "Kolibri1ForCausalLM", "Lfm2MoeForCausalLM"),
    *("LongcatFlashForCausalLM", "MiniMaxM2ForCausalLM", "MuseSparkForConditionalGeneration"),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_router_of_its_own_kind_chooses_for_a_token_alone(family, dtype):
    if family not in FAMILY_NAMES:
        pytest.skip(f"no {family} in this transformers")
    torch.manual_seed(0)
    model = build(family).eval().to(dtype)
    router = next(m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter"))
    for tensor in [*router.parameters(), *router.buffers()]:
        tensor.normal_(std=0.5)
    experts, hidden = next(p for p in router.parameters() if p.dim() == 2).shape
    x, others = torch.randn(40, hidden, dtype=dtype), []
    if len(inspect.signature(router.forward).parameters) == 2:  # what is added for the choice
        others = [torch.randn(experts)]
    expected = router(x, *others)
    accelerate(model)
    assert shadow_of(router) is with_our_products
    together = router(x, *others)
    rows = [router(row, *others) for row in x.split(1)]
    alone = [torch.cat(parts) for parts in zip(*rows, strict=True)]
    for result, own, parts in zip(together, expected, alone, strict=True):
        torch.testing.assert_close(result, own)
        assert torch.equal(result, parts)


def test_what_is_differentiated_is_torchs():
    model = build("MiniMaxM2ForCausalLM").eval()
    router = next(m for m in model.modules() if type(m).__name__ == "MiniMaxM2TopKRouter")
    accelerate(model)
    router.weight.data.normal_()
    correction = torch.zeros(len(router.weight))
    router(torch.randn(3, router.weight.shape[1]), correction)[1][:, 0].sum().backward()
    assert router.weight.grad.abs().sum() > 0
