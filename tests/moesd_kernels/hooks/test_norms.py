"""Every RMS norm of the installed transformers keeps its own rounding when it is accelerated."""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers.models
from torch import nn

from moesd_kernels.dense import ops
from moesd_kernels.hooks.dense import accelerate_dense
from moesd_kernels.hooks.norms import NormRule, recognise_norm

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))

CLASS = re.compile(r"^class \w*RMSNorm\(.*?(?=^\S)", re.MULTILINE | re.DOTALL)
H, ROWS = 192, 500
ROUNDED_APART = 3e-4  # share of values; LlamaRMSNorm's, whose kernel has been its own, is 1e-4
# One of each way in which the classes are written. The kernel rounds once more than most of these.
TAKEN = {
    *("LlamaRMSNorm", "IdeficsRMSNorm", "Llama4TextRMSNorm", "GptOssRMSNorm", "Olmo2RMSNorm"),
    *("Gemma3nRMSNorm", "HeliumRMSNorm", "AfmoeRMSNorm", "NemotronHRMSNorm", "MoshiRMSNorm"),
    *("GemmaRMSNorm", "Gemma3RMSNorm"),
}


def methods(cls: ast.ClassDef) -> str:
    """What a class says in code: two that say the same are one."""
    functions = [node for node in cls.body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        function.returns = None
        if ast.get_docstring(function) is not None:
            del function.body[0]
    return str([ast.unparse(base) for base in cls.bases]) + "".join(map(ast.unparse, functions))


@functools.cache
def classes() -> dict[str, type[nn.Module]]:
    """One class of each source text, and all of ``TAKEN``, by name."""
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(Path(transformers.models.__file__).parent.glob("*/modeling_*.py")):
        for text in CLASS.findall(path.read_text("utf-8")):
            (node,) = ast.parse(text).body
            key = node.name if node.name in TAKEN else methods(node)
            place = f"transformers.models.{path.parent.name}.{path.stem}"
            found.setdefault(key, (node.name, place))
    return {
        name: getattr(importlib.import_module(module), name) for name, module in found.values()
    } | {"RMSNorm": nn.RMSNorm}


def build(cls: type[nn.Module]) -> nn.Module | None:
    """A norm of width ``H``; None where the class takes something else, or has no weight."""
    try:
        module = cls(H, eps=1e-6)
    except TypeError:
        return None
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return None
    nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    return module


@torch.no_grad()
def share_apart(module: nn.Module, dtype: torch.dtype) -> float:
    """Share of values that differ after acceleration; rows from 1e-3 to 100."""
    x = torch.randn(ROWS, H, generator=torch.Generator().manual_seed(2))
    x = (x * torch.logspace(-3, 2, ROWS)[:, None]).to(dtype)
    own = copy.deepcopy(module).to(dtype)
    ours = copy.deepcopy(own)
    assert accelerate_dense(ours) == 1
    expected, actual = own(x), ours(x)
    assert actual.dtype == expected.dtype
    ulp = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=ulp, atol=1e-6)
    return (actual != expected).float().mean().item()


def test_values_are_the_modules_own():
    taken = set()
    for name, cls in classes().items():
        module = build(cls)
        if module is None or recognise_norm(module) is None:
            continue
        taken.add(name)
        for dtype in (torch.bfloat16, torch.float16):
            assert share_apart(module, dtype) <= ROUNDED_APART, (name, dtype)
        share_apart(module, torch.float32)
    assert taken >= TAKEN, TAKEN - taken


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("LlamaRMSNorm", NormRule(1e-6)),
        ("GptOssRMSNorm", NormRule(1e-6, cast_first=False)),
        ("GemmaRMSNorm", NormRule(1e-6, offset=1.0, cast_first=False)),
    ],
)
def test_rules(name, rule):
    assert recognise_norm(build(classes()[name])) == rule


class OwnPrecisionRMSNorm(nn.Module):
    """``w * norm`` computed in the input's dtype: in fp32 it is Llama's, in bf16 it is not."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(H)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class EpsAfterRMSNorm(OwnPrecisionRMSNorm):
    def forward(self, x):
        return self.weight * (x / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + self.eps)).to(
            x.dtype
        )


@pytest.mark.parametrize("cls", [OwnPrecisionRMSNorm, EpsAfterRMSNorm])
def test_a_norm_that_rounds_otherwise_is_left_alone(cls):
    assert recognise_norm(cls()) is None
    assert accelerate_dense(cls()) == 0


def test_a_norm_without_weight_or_epsilon_is_left_alone():
    assert recognise_norm(nn.RMSNorm(H)) is None  # eps of the dtype
    assert recognise_norm(nn.RMSNorm(H, eps=1e-6, elementwise_affine=False)) is None
