"""First piece: what the device is and can do; and the builds that begin before it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from bench.measure.ceilings import measure_ceilings
from bench.measure.machine import machine_with_kernels
from bench.suite.session import Session

# In a process of its own: what it builds lies in a cache that the worker then finds.
BUILD = "from moesd_kernels import library as e; print(e.load('cpu') or e.load('cuda'))"
PROPERTIES = ("multi_processor_count", "L2_cache_size", "total_memory", "major", "minor")


@contextmanager
def builds_in_background(session: Session) -> Iterator[None]:
    """Compile the C++ library and the CUDA extension meanwhile, on cores that nobody uses."""
    if not session.cuda:
        yield
        return
    build = subprocess.Popen([sys.executable, "-c", BUILD])
    try:
        yield
    finally:
        build.kill()


def describe(session: Session) -> None:
    """Ceilings, and the machine as the performance model knows it."""
    found: dict[str, Any] = {}
    if session.cuda:
        properties = torch.cuda.get_device_properties(session.device)
        found = {name: getattr(properties, name, None) for name in PROPERTIES}
    ceilings = measure_ceilings(session.device)
    session.lines.write("roofline", ceilings=asdict(ceilings), properties=found)
    machine = machine_with_kernels(session.device, torch.bfloat16)
    session.lines.write("machine", machine=machine.to_json())
