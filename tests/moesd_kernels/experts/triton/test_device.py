"""What is made of the driver's properties, with drivers that tell more and less."""

from types import SimpleNamespace

import pytest
import torch

from moesd_kernels.experts.triton.device import describe, device_of
from moesd_kernels.experts.triton.types import A100, B200, H100, H200, Device

# name, capability, multiprocessors, memory clock in kHz, bus width in bits, measured copy rate
KNOWN = [
    (H100, (9, 0), 2619000, 5120),
    (H200, (9, 0), 3201000, 6144),
    (A100, (8, 0), 1593000, 5120),
    (B200, (10, 0), 3996000, 8192),
]


def properties(device, capability, **extra):
    major, minor = capability
    return SimpleNamespace(
        name=device.name, major=major, minor=minor, multi_processor_count=device.sms, **extra
    )


@pytest.mark.parametrize(("device", "capability", "clock", "width"), KNOWN, ids=lambda v: str(v))
def test_bandwidth_by_clock_and_width(device, capability, clock, width):
    found = describe(
        properties(device, capability, memory_clock_rate=clock, memory_bus_width=width)
    )
    assert found.bandwidth == pytest.approx(device.bandwidth, rel=0.05)
    assert found.shared_bytes == device.shared_bytes
    assert found.matrix_flops == device.matrix_flops


@pytest.mark.parametrize(
    "untold",
    [{}, {"memory_clock_rate": 0, "memory_bus_width": 0}, {"memory_clock_rate": 2619000}],
    ids=["no attributes", "zeros", "no width"],
)
@pytest.mark.parametrize("device", [H100, H200], ids=lambda device: device.name)
def test_bandwidth_by_name(device, untold):
    """An H100 is not an H200 though both are capability 9.0 with 132 multiprocessors."""
    assert describe(properties(device, (9, 0), **untold)) == device


def test_unknown_device_is_scaled_from_its_generation():
    half = SimpleNamespace(name="NVIDIA A30", major=8, minor=0, multi_processor_count=54)
    found = describe(half)
    assert found.bandwidth == A100.bandwidth / 2
    assert found.shared_bytes == A100.shared_bytes
    consumer = SimpleNamespace(name="RTX", major=8, minor=9, multi_processor_count=128)
    assert describe(consumer).shared_bytes < A100.shared_bytes


def test_without_a_gpu_an_h200_is_assumed():
    assert device_of(torch.device("cpu")) == Device() == H200
