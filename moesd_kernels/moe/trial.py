"""Tries a transformers block against ours: parts that are known may be put together otherwise.

A norm behind the sum, a factor on all of it or a clamp in the shared expert show only in what a
block computes. Tried is a twin with narrow experts and random numbers, so that the block's own
weights may be large, on any device or on none, or all zeros.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .block import flatten, read_block
from .config import MoEConfig

_WIDTH = 8  # of the twin's experts at most; a model's code may count on H and E, not on I
_TOKENS = 16
_SCALES = (0.25, 4.0, 100.0)  # of inputs: near zero, about the usual clamps, and far beyond them


def recognise_block(
    block: nn.Module, ours: Callable[..., nn.Module]
) -> tuple[MoEConfig, Mapping[str, nn.Module]]:
    """A transformers block's configuration, and its parts under our names, once it was tried.

    Args:
        block: on any device, of any dtype.
        ours: the class ``MoE``.

    Raises:
        ValueError: ``read_block`` refuses it, or it computes something else of its parts.
    """
    config, parts = read_block(block)
    narrow = replace(
        config,
        intermediate_size=min(_WIDTH, config.intermediate_size),
        shared_intermediate_size=min(_WIDTH, config.shared_intermediate_size),
    )
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        for scale in _SCALES:
            moe = ours(narrow, backend="torch", device="meta", dtype=torch.float32)
            _require_equal(block, parts, moe, scale)
    return config, parts


def _require_equal(
    block: nn.Module, parts: Mapping[str, nn.Module], moe: nn.Module, scale: float
) -> None:
    shapes = {name: tensor.shape for name, tensor in moe.state_dict().items()}
    held = {name: tensor for name, tensor in flatten(parts) if name in shapes}
    hidden = shapes["gate.weight"][1]
    twins = _Twins({id(tensor): shapes[name] for name, tensor in held.items()}, hidden**-0.5)
    # The scale is the experts' to see: a score that is 0 or 1 leaves the choice to chance.
    twins.narrower[id(held.get("gate.weight"))] = 1 / scale
    twin: Any = twins.of(block)
    x = scale * torch.randn(1, _TOKENS, hidden, generator=twins.generator, dtype=torch.float32)
    what = f"what {type(block).__name__} computes of its parts is not what MoE does"
    try:
        state = dict(flatten({name: twins.of(part) for name, part in parts.items()}))
        moe.load_state_dict(state, strict=True, assign=True)
        expected = twin(x.clone())
        expected = expected[0] if isinstance(expected, tuple) else expected
        actual = moe(x).view_as(expected)
    except Exception as error:  # whatever a class may do with parts that are not as it expects
        raise ValueError(f"{what}: {str(error) or type(error).__name__}") from error
    apart, size = (actual - expected).norm().item(), expected.norm().item()
    if not apart <= 1e-4 * size:
        raise ValueError(f"{what}: for inputs of {scale} they differ by {apart:.3g} of {size:.3g}")


class _Twins:
    """Modules of the same classes and attributes on the CPU in fp32, with numbers drawn anew.

    Args:
        shapes: of tensors whose twins are of another shape, by id.
        std: of the numbers.

    Attributes:
        narrower: a factor on the numbers of some tensors, by id.
    """

    def __init__(self, shapes: Mapping[int, torch.Size], std: float) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.narrower: dict[int, float] = {}
        self._shapes, self._std = shapes, std
        self._made: dict[int, Any] = {}  # what is in two places is one twin in two places

    def of(self, module: nn.Module) -> nn.Module:
        """The twin of a module."""
        if id(module) in self._made:
            return self._made[id(module)]
        self._made[id(module)] = twin = copy.copy(module)
        twin.__dict__.pop("forward", None)  # ask the class, not a replacement of ours
        twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(), OrderedDict()
        twin.training = False
        config: Any = copy.copy(twin.__dict__.get("config"))
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation_internal = "eager"
            twin.__dict__["config"] = config
        parameters, buffers, modules = module._parameters, module._buffers, module._modules
        twin._parameters = {
            name: None if one is None else nn.Parameter(self._drawn(one), requires_grad=False)
            for name, one in parameters.items()
        }
        twin._buffers = {n: None if one is None else self._drawn(one) for n, one in buffers.items()}
        twin._modules = {n: None if one is None else self.of(one) for n, one in modules.items()}
        return twin

    def _drawn(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._made:
            self._made[id(tensor)] = self._draw(tensor)
        return self._made[id(tensor)]

    def _draw(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            meta = tensor.device.type == "meta"
            return torch.zeros_like(tensor, device="cpu") if meta else tensor.detach().cpu().clone()
        shape = self._shapes.get(id(tensor), tensor.shape)
        std = self._std * self.narrower.get(id(tensor), 1.0)
        if len(shape) != 3:
            return self._numbers(*shape) * std
        # A window of the same numbers for each expert: there may be hundreds.
        experts, rows, depth = shape
        return (self._numbers(experts + rows * depth) * std).as_strided(shape, (1, depth, 1))

    def _numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float32)
