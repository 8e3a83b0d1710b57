"""What all launchers share: checks, a tensor as rows, programmatic dependent launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesd_kernels.experts.triton.common import HAS_PDL
from moesd_kernels.experts.triton.device import device_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_floating(x: Tensor, name: str) -> None:
    """Kernels compute from these dtypes alone.

    Raises:
        TypeError: another one.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")


def check_like(x: Tensor, name: str, sizes: Sequence[int], dtype: torch.dtype) -> None:
    """What a kernel takes for granted of an argument.

    Raises:
        ValueError: other sizes.
        TypeError: another dtype.
    """
    if x.shape != torch.Size(sizes):
        raise ValueError(f"{name} must be {list(sizes)}, got {list(x.shape)}")
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")


def rows_of(x: Tensor) -> Tensor:
    """x ``[..., N]`` as ``[rows, N]`` with adjacent columns: a view wherever strides allow one."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Launch arguments of programmatic dependent launch; only Hopper and newer know the option.

    Safe behind any launch: the kernels wait for the former one to complete before they read or
    write what it may have written or read, and one that does not trigger its dependents is waited
    for as a whole.
    """
    if HAS_PDL and device.type == "cuda" and device_of(device).capability >= 90:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
