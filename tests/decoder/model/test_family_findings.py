"""The page of all families, and that a wrong family would be noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import FAMILY_NAMES, NOT_BUILT, build, findings
from support.families.findings import PAGE, finding, stated
from support.versions import needs_the_transformers_of_the_families_page


@needs_the_transformers_of_the_families_page
def test_the_page_has_a_line_for_every_class() -> None:
    assert list(stated()) == FAMILY_NAMES
    left_out = PAGE.read_text().partition("## Not tried")[2]
    assert all(f"| {name} |" in left_out for name in NOT_BUILT)


def test_another_output_than_the_models_own_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    own = findings._generated
    monkeypatch.setattr(findings, "_generated", lambda *given: [4, *own(*given)[1:]])
    with pytest.raises(AssertionError, match="LlamaForCausalLM"):
        finding("LlamaForCausalLM")


def test_experts_that_change_the_logits_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def accelerate(model: Any) -> None:
        with torch.no_grad():
            model.lm_head.weight[0] += 1

    monkeypatch.setattr(findings.moesd_kernels, "accelerate", accelerate)
    with pytest.raises(AssertionError, match="accelerated logits are off"):
        finding("MixtralForCausalLM")


def test_a_model_is_the_same_each_time() -> None:
    first, second = build("Qwen3MoeForCausalLM"), build("Qwen3MoeForCausalLM")
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
