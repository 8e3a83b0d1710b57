"""The MoE layer's pieces: every point of a shape, ours beside its peers, in replayed graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.runs.layer import LayerBenchmark
from bench.runs.layer_record import Settings
from bench.suite.session import Session
from bench.workloads.layer import Layer
from bench.workloads.routing import DEFAULT_UNION_RATIO
from moesd_kernels import fused_experts

PEERS = ("grouped_mm", "batched_mm")
OURS, INVARIANT = "moesd", "batch_invariant"
# What a point takes: capturing every variant, its rounds and the profile.
POINT_S = 4.0


def measure(name: str, backend: str, session: Session) -> None:
    """Every point of shape ``name`` that has no line yet.

    Raises:
        RuntimeError: points failed with their peers, and were measured without them.
        OutOfTimeError: points are left.
    """
    shape, tuned = session.sizes.shapes[name], session.tuned
    key = {"shape": list(shape), "backend": backend, "tuned": tuned}
    points = [
        (B, rows)
        for B, rows in session.sizes.points
        if not session.lines.find("kernel", B=B, gamma=rows - 1, **key)
    ]
    if not points:
        return
    benchmark = _benchmark(name, backend, session)
    all_calls = benchmark.calls
    our_calls = {name: all_calls[name] for name in (OURS, INVARIANT) if name in all_calls}
    failed = []
    for batch, rows in points:
        if not session.begin(f"{name} {backend} B={batch} rows={rows}"):
            continue
        session.need(POINT_S)
        with session.lines.marked(tuned=tuned):
            try:
                benchmark.calls = all_calls
                benchmark.measure(batch, rows)
            except Exception as error:  # a peer with another result must not cost our own time
                failed.append(f"B={batch} rows={rows}: {type(error).__name__}: {error}"[:300])
                benchmark.calls = our_calls
                benchmark.measure(batch, rows)
    del benchmark
    session.release()
    if failed:
        raise RuntimeError("; ".join(failed))


def _benchmark(name: str, backend: str, session: Session) -> LayerBenchmark:
    settings = Settings(
        dtype=torch.bfloat16,
        device=session.device,
        routing="uniform",
        union_ratio=DEFAULT_UNION_RATIO,
        rounds=session.sizes.rounds,
        budget_s=2.0,
        backend=backend,
        batch_invariant=False,
        graph=session.cuda,
        peers=PEERS if backend == "auto" else (),
        fused_moe_source=session.source if session.cuda and backend == "auto" else None,
    )
    shape = session.sizes.shapes[name]
    benchmark = LayerBenchmark(shape, settings, session.ceilings(), session.lines, None)
    if backend == "auto":
        benchmark.calls[INVARIANT] = _invariant
    return benchmark


def _invariant(layer: Layer, hidden: Tensor, ids: Tensor, weights: Tensor) -> Any:
    return fused_experts(hidden, layer.w_gate_up, layer.w_down, ids, weights, batch_invariant=True)
