"""The difference file: what makes many experts of one dense feed-forward network.

Expert e's matrix is ``dense + scale[e] * (left[e] @ right[e])``, a learned difference of low rank,
with its neurons turned round by e / E of their number, which changes no output and leaves no two
experts with the same bytes. The file holds, per layer l and matrix m of ``MATRICES``, with shapes
``[out, in]`` of the dense matrix and r the rank:

* ``layers.{l}.{m}.left`` int8 ``[E, out, r]`` and ``layers.{l}.{m}.right`` int8 ``[E, r, in]``
* ``layers.{l}.{m}.scale`` fp32 ``[E]``
* ``layers.{l}.router`` bf16 ``[E, H]``

The product of integers is exact in fp32 in whatever order it is summed (up to rank 1040), and one
multiplication and one addition are rounded alike everywhere: the experts have the same bits on
every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# Which dimension of the dense matrix [out, in] counts the neurons.
MATRICES = {"gate": 0, "up": 0, "down": 1}
_LARGEST = 127


class LowRank(NamedTuple):
    """One matrix's difference for all experts: ``scale * (left @ right)``.

    Attributes:
        left: ``[E, out, r]`` int8.
        right: ``[E, r, in]`` int8.
        scale: ``[E]`` fp32.
    """

    left: Tensor
    right: Tensor
    scale: Tensor


def quantized(left: Tensor, right: Tensor) -> LowRank:
    """``left @ right`` with the factors in 8 bits and one scale per expert.

    The factors' columns and rows may be of any size, so each pair is first given one size on both
    sides, which leaves the product as it is. Rounding loses 1.2 to 1.4 % of the difference's norm
    (normal factors of this model's shapes, components alike or up to ten times apart).

    Args:
        left: ``[E, out, r]`` floating point.
        right: ``[E, r, in]`` floating point.
    """
    left, right = left.detach().float(), right.detach().float()
    columns = left.abs().amax(dim=1)  # [E, r]
    rows = right.abs().amax(dim=2)  # [E, r]
    # A pair of which one side is zero is no difference, whatever the other is.
    balance = torch.where((columns > 0) & (rows > 0), rows / columns, 0).sqrt()
    left = left * balance[:, None, :]
    right = right * torch.where(balance > 0, 1 / balance, 0)[:, :, None]
    left, left_scale = _rounded(left)
    right, right_scale = _rounded(right)
    return LowRank(left, right, left_scale * right_scale)


def _rounded(factor: Tensor) -> tuple[Tensor, Tensor]:
    """int8 and the step ``[E]`` of each expert's factor ``[E, ...]``."""
    step = factor.abs().amax(dim=(1, 2)) / _LARGEST
    steps = torch.where(step > 0, step, 1)[:, None, None]
    return (factor / steps).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), step


def experts(dense: Tensor, low: LowRank, neurons: int) -> Tensor:
    """Every expert's matrix ``[E, out, in]`` bf16.

    Args:
        dense: ``[out, in]`` fp32, the matrix that they come from.
        low: how they differ from it.
        neurons: the dimension of ``dense`` that counts neurons, from ``MATRICES``.
    """
    count, size = len(low.scale), dense.shape[neurons]
    made = torch.empty(count, *dense.shape, dtype=torch.bfloat16)
    weight = torch.empty_like(dense)
    for e in range(count):  # one at a time, since an expert fits the processor's cache
        torch.matmul(low.left[e].float(), low.right[e].float(), out=weight)
        weight.mul_(low.scale[e]).add_(dense)  # not fused: see above
        turn = e * size // count
        before, after = weight.split([size - turn, turn], dim=neurons)
        made[e].narrow(neurons, turn, size - turn).copy_(before)
        made[e].narrow(neurons, 0, turn).copy_(after)
    return made


def write_difference(file: Path, factors: Mapping[str, Tensor]) -> None:
    """Write the file from what was trained.

    Args:
        file: where to; overwritten.
        factors: the file's names without the scales: ``layers.{l}.{m}.left`` and ``.right`` in
            floating point, ``layers.{l}.router``; on any device.
    """
    from safetensors.torch import save_file

    tensors = {}
    for name, factor in factors.items():
        matrix, _, part = name.rpartition(".")
        if part == "router":
            tensors[name] = factor.detach().to("cpu", torch.bfloat16).contiguous()
        elif part == "left":
            low = quantized(factor, factors[f"{matrix}.right"])
            tensors |= {
                f"{matrix}.{key}": value.cpu().contiguous() for key, value in low._asdict().items()
            }
    save_file(tensors, file)


class Difference:
    """A difference file in memory."""

    def __init__(self, file: Path) -> None:
        """Read it.

        Raises:
            OSError: it cannot be read.
        """
        from safetensors.torch import load_file

        self._tensors = load_file(file)

    def router(self, layer: int) -> Tensor:
        """``[E, H]`` bf16."""
        return self._tensors[f"layers.{layer}.router"]

    def experts(self, layer: int, matrix: str, dense: Tensor) -> Tensor:
        """Every expert's ``matrix`` of a layer, ``[E, out, in]`` bf16; see ``experts``."""
        name = f"layers.{layer}.{matrix}"
        low = LowRank(*(self._tensors[f"{name}.{part}"] for part in LowRank._fields))
        return experts(dense, low, MATRICES[matrix])
