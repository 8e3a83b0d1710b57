"""Layer calls compiled before they are timed, by several processes: a kernel takes a second."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.workloads.layer import Layer
from bench.workloads.shapes import Shape
from moesd_kernels.experts.triton.types import LayerTiles

COMPILERS = 14
# What a dry run compiles for: the architecture of the first GPUs this met.
DRY_CAPABILITY = 90


@dataclass(frozen=True, slots=True)
class Job:
    """A layer call whose kernels are wanted.

    Attributes:
        tokens: entering the layer.
        config: tiles to compile, or None for what the selector takes, batch-invariant too.
        source: folder with vLLM's ``fused_moe.py``, whose kernels are wanted, too, or None.
    """

    shape: Shape
    tokens: int
    config: LayerTiles | None = None
    source: Path | None = None


def compile_jobs(
    jobs: Sequence[Job], dtype: torch.dtype, device: torch.device, seconds: float
) -> tuple[int, list[int | None]]:
    """Compile in processes that share the work, and Triton's cache with this one.

    Returns:
        How many processes were stopped after ``seconds``, and the exit codes of all.
    """
    count = min(COMPILERS, os.cpu_count() or 1, max(1, len(jobs)))
    spawn = multiprocessing.get_context("spawn")
    shares = [(list(jobs[i::count]), dtype, device.type) for i in range(count)]
    children = [spawn.Process(target=_compile_share, args=share) for share in shares]
    end = time.monotonic() + seconds
    for child in children:
        child.start()
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
    late = sum(child.is_alive() for child in children)
    for child in children:
        child.kill()
        child.join()
    return late, [child.exitcode for child in children]


def _compile_share(jobs: list[Job], dtype: torch.dtype, device: str) -> None:
    """A process's share: launches stopped short of the device; the first trouble is raised last."""
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    if device == "cpu":
        driver.set_active(StandInDriver())
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    trouble = None
    for job in jobs:
        try:
            _compile(job, dtype, device)
        except Exception as error:  # a tile that one compiler refuses must not cost the others
            trouble = error
    if trouble is not None:
        raise trouble


def _compile(job: Job, dtype: torch.dtype, device: str) -> None:
    from moesd_kernels.experts.spec import DEFAULT_SPEC, ExpertsWeights, TopK
    from moesd_kernels.experts.triton import fused_experts_triton

    E, K, H, I = job.shape
    empty = lambda *sizes: torch.empty(*sizes, dtype=dtype, device=device)
    layer = Layer(job.shape, empty(E, 2 * I, H), empty(E, H, I))
    ids = torch.zeros(job.tokens, K, dtype=torch.int64, device=device)
    routed: tuple[Tensor, ...] = empty(job.tokens, H), ids, empty(job.tokens, K)
    tensors = ExpertsWeights(layer.w_gate_up, layer.w_down), TopK(*routed[1:])
    for invariant in (False, True) if job.config is None else (False,):
        fused_experts_triton(
            routed[0], *tensors, DEFAULT_SPEC, batch_invariant=invariant, config=job.config
        )
    for peer in _peers(job.source, job.shape, device).values():
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
