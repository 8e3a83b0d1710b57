"""Every Triton kernel of the layer measurements, compiled before them by several processes."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch

from bench.suite.session import Session
from bench.workloads.layer import Layer
from bench.workloads.shapes import Shape

COMPILERS = 12
# What a dry run compiles for: the architecture of the first GPUs this will meet.
DRY_CAPABILITY = 90


def compile_kernels(session: Session) -> None:
    """Compile for every point of every shape; measurements compile what is missing.

    Raises:
        RuntimeError: a process failed; the log says why.
    """
    sizes = session.sizes
    jobs = [(shape, B * rows) for B, rows in sizes.points for shape in sizes.shapes.values()]
    count = min(COMPILERS, os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    shares = [(jobs[i::count], session.device.type, session.source) for i in range(count)]
    children = [spawn.Process(target=compile_layers, args=share) for share in shares]
    for child in children:
        child.start()
    for child in children:
        child.join(max(0.0, session.left()))
    late = sum(child.is_alive() for child in children)
    for child in children:
        child.kill()
        child.join()
    codes = [child.exitcode for child in children]
    session.lines.write("compiled", layers=len(jobs), processes=count, late=late)
    if late < sum(code != 0 for code in codes):
        raise RuntimeError(f"compiling processes ended with codes {codes}, {late} of them late")


def compile_layers(jobs: list[tuple[Shape, int]], device: str, source: Path | None) -> None:
    """A process's share: the launches of ours and the peer's, stopped short of the device."""
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from moesd_kernels.experts.spec import DEFAULT_SPEC, ExpertsWeights, TopK
    from moesd_kernels.experts.triton import fused_experts_triton

    if device == "cpu":
        driver.set_active(StandInDriver())
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    empty = lambda *sizes: torch.empty(*sizes, dtype=torch.bfloat16, device=device)
    for shape, tokens in jobs:
        E, K, H, I = shape
        layer = Layer(shape, empty(E, 2 * I, H), empty(E, H, I))
        ids = torch.zeros(tokens, K, dtype=torch.int64, device=device)
        routed = empty(tokens, H), ids, empty(tokens, K)
        for invariant in (False, True):
            hidden, ids, weights = routed
            tensors = ExpertsWeights(layer.w_gate_up, layer.w_down), TopK(ids, weights)
            fused_experts_triton(hidden, *tensors, DEFAULT_SPEC, batch_invariant=invariant)
        for peer in _peers(source, shape, device).values():
            peer(layer, *routed)


def _peers(source: Path | None, shape: Shape, device: str) -> dict[str, Any]:
    if source is None:
        return {}
    from bench.peers.fused_moe_triton import TUNED_ELSEWHERE, FusedMoeTriton, fused_moe_peers

    if device == "cpu":
        return {TUNED_ELSEWHERE: FusedMoeTriton(source, TUNED_ELSEWHERE)}
    return dict(fused_moe_peers(source, shape, torch.bfloat16, torch.device(device)))


class StandInDriver:
    """What Triton's compiler asks a driver for, where there is none: a dry run's."""

    def get_current_target(self) -> Any:
        """The architecture to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", DRY_CAPABILITY, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Nothing is launched on it."""
        return 0
