"""What the selector needs to know about the device tensors lie on."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .types import A100, B200, H100, H200, Device

# Others of a generation have about 99 KB of shared memory a program.
_SERVER = ((8, 0), (9, 0), (10, 0), (10, 3))
_OTHER_SHARED_BYTES = 101376
# What a copy reaches of clock times width: 3.0 of 3.35 TB/s on an H100, 4.3 of 4.9 on an H200.
_COPY_SHARE = 0.89
# Clock times width outside of this is a driver that does not know them.
_CREDIBLE = (1e11, 2e13)


@functools.lru_cache
def device_of(device: torch.device) -> Device:
    """The properties of a device that configurations depend on."""
    if device.type != "cuda":
        return Device()
    return describe(torch.cuda.get_device_properties(device))


def describe(found: Any) -> Device:
    """A device from the driver's properties (torch's, or anything with the same attributes).

    Devices of one generation differ in memory: bandwidth comes from memory clock (kHz) and bus
    width (bits) where they are told, else from the name. Arithmetic is not told: it is scaled by
    multiprocessors from a device of the same generation, and so is the bandwidth of an unknown one.
    """
    like = _relative(found)
    scale = found.multi_processor_count / like.sms
    server = (found.major, found.minor) in _SERVER
    return Device(
        name=found.name,
        capability=10 * found.major + found.minor,
        sms=found.multi_processor_count,
        shared_bytes=like.shared_bytes if server else _OTHER_SHARED_BYTES,
        bandwidth=_copy_rate(found) or like.bandwidth * scale,
        matrix_flops=like.matrix_flops * scale,
    )


def _relative(found: Any) -> Device:
    """The known device that is most like this one."""
    if found.major < 9:
        return A100
    if found.major > 9:
        return B200
    return H200 if "H200" in found.name else H100


def _copy_rate(found: Any) -> float | None:
    """Bytes per second of a copy by clock and width; two transfers a cycle."""
    clock, width = (getattr(found, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    peak = 2 * 1e3 * clock * width / 8
    return _COPY_SHARE * peak if _CREDIBLE[0] < peak < _CREDIBLE[1] else None
