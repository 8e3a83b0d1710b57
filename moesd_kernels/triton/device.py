"""What the selector needs to know about the device tensors lie on."""

from __future__ import annotations

import functools

import torch

from .types import A100, B200, H200, Device

# Others of a generation have about 99 KB of shared memory a program.
_SERVER = ((8, 0), (9, 0), (10, 0), (10, 3))
_OTHER_SHARED_BYTES = 101376


@functools.lru_cache
def device_of(device: torch.device) -> Device:
    """The properties of a device that configurations depend on.

    The driver does not tell bandwidth and arithmetic; they are scaled by multiprocessors from a
    device of the same generation, which keeps their ratio about right.
    """
    if device.type != "cuda":
        return Device()
    found = torch.cuda.get_device_properties(device)
    like = A100 if found.major < 9 else H200 if found.major == 9 else B200
    scale = found.multi_processor_count / like.sms
    server = (found.major, found.minor) in _SERVER
    return Device(
        name=found.name,
        capability=10 * found.major + found.minor,
        sms=found.multi_processor_count,
        shared_bytes=like.shared_bytes if server else _OTHER_SHARED_BYTES,
        bandwidth=like.bandwidth * scale,
        matrix_flops=like.matrix_flops * scale,
    )
