"""Triton kernels behind ``torch.ops.moesd`` for CUDA tensors; the first call imports Triton.

Not run on a GPU yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

# The file of each in ``dense.triton``; the function has the operator's name.
OPERATORS = {
    "linear": "linear_kernel",
    "ragged_attention": "attention",
    "rms_norm": "norm_kernel",
    "add_rms_norm": "norm_kernel",
    "rope_to_cache": "rope_kernel",
    "act_and_mul": "activation_kernel",
    "softmax_topk_router": "router_kernel",
    "argmax": "argmax_kernel",
    "gated_delta_rule": "recurrent.delta_rule_kernel",
    "selective_state_update": "recurrent.state_space_kernel",
    "selective_scan": "recurrent.state_space_kernel",
    "short_convolution": "recurrent.convolution_kernel",
    "gated_rms_norm": "recurrent.gated_norm_kernel",
}


@functools.cache  # once per process: a second kernel for a key is refused
def register_kernels() -> None:
    """Tell the dispatcher; the schemas must be loaded."""
    for name in OPERATORS:
        torch.library.impl(f"moesd::{name}", "CUDA", implementation(name))


def implementation(name: str) -> Callable[..., Any]:
    """The operator on tensors of a GPU, whichever is current."""

    @guarded
    def run(*arguments: Any) -> Any:
        function = getattr(import_module(f"moesd_kernels.dense.triton.{OPERATORS[name]}"), name)
        return function(*arguments)

    return run


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the device of its first tensor current: Triton launches on that one."""

    @functools.wraps(function)
    def run(first: Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.cuda.device(first.device if first.is_cuda else -1):
            return function(first, *arguments, **options)

    return run
