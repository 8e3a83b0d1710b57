"""Named machines, row curves, and the measurement of this one."""

import pytest
import torch

from decoder.perf_model.hardware.machine import MACHINES, Machine, RowCurve, named_machine
from decoder.perf_model.hardware.measure_gpu import measure_gpu
from decoder.perf_model.hardware.measure_machine import measure_machine


def test_h200_is_the_measured_one() -> None:
    h200 = named_machine("H200")
    assert h200.bandwidth == pytest.approx(4.3e12)
    assert h200.peak("bf16") == pytest.approx(790e12)
    assert h200.ridge_point() == pytest.approx(184, abs=1)  # rows per expert
    assert h200.peak("fp8") == pytest.approx(2 * 790e12)
    assert h200.peak("int4") == h200.peak("bf16")


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_every_machine_says_where_its_numbers_come_from(name: str) -> None:
    assert "datasheet" in MACHINES[name].source and "assumed" in MACHINES[name].source
    assert Machine.from_json(MACHINES[name].to_json()) == MACHINES[name]


def test_tensor_parallel_group() -> None:
    one, two = named_machine("a800"), named_machine("2xa800")
    assert two.bandwidth == 2 * one.bandwidth and two.sync > 0
    assert two.ridge_point() == pytest.approx(one.ridge_point())
    assert one.parallel(1) is one


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"machine must be one of .* got 'h300'"):
        named_machine("h300")
    with pytest.raises(ValueError, match="bandwidth of machine 'x' must be positive, got 0"):
        Machine("x", 0.0, {"bf16": 1.0}, 1e-6)
    for name in ("expert_bandwidth", "expert_flops", "link_bandwidth"):
        with pytest.raises(ValueError, match=f"{name} of machine 'x' must be positive, got -1"):
            Machine("x", 1.0, {"bf16": 1.0}, 1e-6, **{name: -1})
    with pytest.raises(ValueError, match="memory_bytes of machine 'x' must be >= 0, got nan"):
        Machine("x", 1.0, {"bf16": 1.0}, 1e-6, memory_bytes=float("nan"))
    with pytest.raises(ValueError, match="needs flops of at least one dtype"):
        Machine("x", 1.0, {}, 1e-6)
    with pytest.raises(ValueError, match="two or more increasing rows"):
        RowCurve((1.0, 1.0), (1e-9, 1e-9))
    with pytest.raises(ValueError, match="must be positive"):
        RowCurve((1.0, 2.0), (1e-9, 0.0))
    with pytest.raises(ValueError, match="not a machine description"):
        Machine.from_json({"name": "x"})
    with pytest.raises(ValueError, match="devices must be at least 1, got 0"):
        named_machine("h200").parallel(0)


def test_measures_this_machine_within_its_budget() -> None:
    """Plausibility only: a shared test machine gives no exact numbers."""
    calls = []

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return torch.nn.functional.linear(x, weight)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        machine = measure_machine(dtype=torch.float32, linear=linear, width=256, budget=0.5)
    finally:
        torch.set_num_threads(threads)
    assert machine.dense_curve is not None and machine.dense_curve.rows[0] == 1.0
    assert set(calls) >= {1, 64, 512}  # the given operation was the one timed
    assert 1e9 < machine.bandwidth < 1e12
    assert 1e8 < machine.peak("fp32") < 1e14
    assert 1e-8 < machine.launch < 1e-3
    assert machine.dense_curve.seconds[-1] > 4 * machine.dense_curve.seconds[0]
    assert Machine.from_json(machine.to_json()) == machine


def test_slower_memory_costs_reading_and_nothing_else():
    curve = RowCurve((1.0, 8.0, 64.0), (2e-11, 3e-11, 9e-11))
    machine = Machine("m", 5e10, {"bf16": 9e11}, 1e-6, expert_bandwidth=4e10, expert_curve=curve)
    slow = machine.at_memory_speed(0.5)
    assert (slow.bandwidth, slow.expert_bandwidth, slow.flops) == (2.5e10, 2e10, machine.flops)
    assert slow.expert_curve is not None and slow.dense_curve is None
    assert slow.expert_curve.seconds == pytest.approx((4e-11, 5e-11, 11e-11))
    assert machine.at_memory_speed(1.0) == machine


def test_a_gpu_is_measured_in_graphs_of_cold_weights(monkeypatch):
    monkeypatch.setattr("decoder.perf_model.hardware.measure_gpu._READ_BYTES", 2**20)
    calls, timed = [], []

    def linear(x, weight):
        calls.append((len(x), weight.data_ptr()))
        return torch.nn.functional.linear(x, weight)

    def best(run, repeats):
        run()  # the capture
        timed.append(repeats)
        return 0.5

    cache, width = 3e5, 64
    bandwidth, launch, curve = measure_gpu(
        torch.device("cpu"), torch.float32, linear, width, cache, best
    )
    assert len(timed) == 2 + len(curve.rows) and min(timed) >= 3
    assert bandwidth == 2 * 2**20 and launch == 0.5 / 200
    for rows in curve.rows:
        weights = [weight for tokens, weight in calls if tokens == rows]
        assert len(weights) == len(set(weights)), "no weight is read twice in a graph"
        assert len(weights) * width * width * 4 >= 4 * cache
    assert curve.seconds[0] == pytest.approx(0.5 / len(weights) / width**2)


def test_a_gpu_takes_the_graph_path(monkeypatch):
    seen = []

    def fake(device, dtype, linear, width, cache):
        seen.append((device.type, width, cache))
        return 3e12, 2e-6, RowCurve((1.0, 2.0), (1e-12, 1e-12))

    monkeypatch.setattr("decoder.perf_model.hardware.measure_machine.measure_gpu", fake)
    monkeypatch.setattr(
        "decoder.perf_model.hardware.measure_machine._cache_bytes", lambda device: 5e7
    )
    monkeypatch.setattr(
        "decoder.perf_model.hardware.measure_machine._device_name", lambda device: "gpu"
    )
    machine = measure_machine("cuda")
    assert seen == [("cuda", 4096, 5e7)] and machine.bandwidth == 3e12
    assert "in CUDA graphs" in machine.source
