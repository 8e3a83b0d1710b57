"""The random arguments of one call of a native op, which end where their storage ends."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from support.formats import stored_weight
from torch import Tensor

from moesd_kernels.formats import WEIGHT_FORMATS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXTREMES = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 65504.0, -0.0]
COUNTS = (0, 1, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 25, 33, 49)
WIDTHS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 250, 257, 800, 1025)


class Draw:
    """The arguments of one call."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self.dtype = self.among(DTYPES)
        self.extreme = self.chance(0.3)
        self.tensors: list[tuple[Tensor, Tensor]] = []  # drawn, and a copy

    def among(self, values: Any) -> Any:
        return self._random.choice(values)

    def chance(self, probability: float = 0.5) -> bool:
        return self._random.random() < probability

    def below(self, stop: int, *shape: int) -> Tensor:
        return torch.randint(stop, shape, generator=self._generator)

    def flat(self, *shape: int, scale: float = 1.0) -> Tensor:
        """A contiguous tensor that may begin inside its storage, and ends where that ends."""
        offset = self.among((0, 0, 1, 3))
        size = torch.Size(shape).numel()
        storage = torch.randn(offset + size, generator=self._generator).mul_(scale)
        if self.extreme and size:
            places = self.below(offset + size, 1 + size // 50)
            storage[places] = torch.tensor([self.among(EXTREMES) for _ in places])
        return self._kept(storage.to(self.dtype)[offset:].view(shape))

    def any_layout(self, *shape: int) -> Tensor:
        """The same, or a view of every second column, or of a transposed tensor."""
        kind = self.among(("flat", "flat", "spread", "turned"))
        if kind == "flat" or len(shape) < 2:
            return self.flat(*shape)
        if kind == "spread":
            return self._kept(self.flat(*shape[:-1], 2 * shape[-1])[..., ::2])
        return self._kept(self.flat(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2))

    def stored(self, name: str, *shape: int) -> tuple[Tensor, Tensor | None]:
        """Weight and scale of a format, which may begin anywhere; any bytes, where extreme."""
        pair = stored_weight(name, *shape, seed=self.below(1000).item())
        return tuple(None if tensor is None else self._placed(tensor) for tensor in pair)

    def depth(self, name: str, depth: int) -> int:
        """A depth that the format can hold, about as large."""
        block = WEIGHT_FORMATS[name].block
        block = 32 if name in ("int8", "int4") else block
        return -(-max(depth, 1) // block) * block

    def _placed(self, tensor: Tensor) -> Tensor:
        offset = self.among((0, 0, 1, 3)) * tensor.itemsize
        storage = self.below(256, offset + tensor.nbytes).to(torch.uint8)
        if not self.extreme:
            storage[offset:] = tensor.flatten().view(torch.uint8)
        return self._kept(storage[offset:]).view(tensor.dtype).view(tensor.shape)

    def _kept(self, tensor: Tensor) -> Tensor:
        self.tensors.append((tensor, tensor.clone()))
        return tensor

    def close(self, actual: Tensor, exact: Callable[..., Tensor], *tensors: Tensor) -> None:
        """Ordinary values are near ``exact`` of the tensors, at the scale of its largest value."""
        assert actual.dtype == self.dtype
        if self.extreme or not actual.numel():
            return
        expected = exact(*(tensor.double() for tensor in tensors))
        assert actual.shape == expected.shape
        error = (actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1)
        assert error <= 16 * torch.finfo(self.dtype).eps, error


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
