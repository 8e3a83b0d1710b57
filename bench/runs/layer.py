"""One MoE layer timed at many (B, gamma): ours, peers and the roofline on the same batches."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.measure.ceilings import CeilingProbe, Ceilings
from bench.measure.graph import CapturedStack, LayerCall, stack_size
from bench.measure.launches import launch_seconds
from bench.measure.record import Recorder
from bench.measure.timer import CacheFlusher, interleaved, seconds_of, summarize
from bench.peers.experts_transformers import TransformersExperts
from bench.peers.vllm_experts import VllmExperts
from bench.workloads.layer import Batch, Layer, floor_seconds, layer_bytes, make_batch, make_layer
from bench.workloads.shapes import Shape
from moesd_kernels import fused_experts

if TYPE_CHECKING:
    from bench.peers.fused_moe_triton import FusedMoeTriton

logger = logging.getLogger(__name__)

BATCHED_LIMIT_BYTES = 4 * 2**30  # batched_mm copies the weights of every (token, expert) pair
ROUND_SEED = 1_000
PROFILED_ROUNDS = 5
RATES = ("read", "peak")  # samples of the ceilings, taken as variants
SLOW_S = 1.0  # a peer this slow is timed once, in its correctness gate


@dataclass(frozen=True, slots=True)
class Settings:
    """What stays the same over all points of a run.

    Attributes:
        graph: time CUDA graphs of a stack of layers instead of single calls.
        peers: names of transformers' implementations.
        fused_moe_source: folder with vLLM's ``fused_moe.py`` and ``configs/``; needs ``graph``,
            since the host's time around that kernel would not be vLLM's.
    """

    dtype: torch.dtype
    device: torch.device
    routing: str
    union_ratio: float
    rounds: int
    budget_s: float
    backend: str
    batch_invariant: bool
    graph: bool
    peers: Sequence[str]
    fused_moe_source: Path | None = None

    def __post_init__(self) -> None:
        if self.fused_moe_source and not self.graph:
            raise ValueError("fused_moe_source is timed in CUDA graphs only: on a GPU, not eagerly")


class LayerBenchmark:
    """Holds the weights of one shape and measures points on them."""

    def __init__(
        self,
        shape: Shape,
        settings: Settings,
        ceilings: Ceilings,
        recorder: Recorder,
        vllm: VllmExperts | None,
    ) -> None:
        self.shape, self.settings, self.ceilings = shape, settings, ceilings
        self.recorder, self.vllm = recorder, vllm
        weights = shape.E * shape.expert_bytes(settings.dtype.itemsize)
        count = stack_size(weights) if settings.graph else 1
        self.layers = [
            make_layer(shape, settings.dtype, settings.device, seed) for seed in range(count)
        ]
        self.flush = CacheFlusher(settings.device)
        on_cpu = settings.device.type == "cpu"
        self.probe = CeilingProbe(settings.dtype) if on_cpu else None
        self.calls: dict[str, LayerCall] = {"moesd": self._ours}
        self.calls |= {name: TransformersExperts(name) for name in settings.peers}
        self.fused_moe: dict[str, FusedMoeTriton] = {}
        if settings.fused_moe_source:
            from bench.peers.fused_moe_triton import fused_moe_peers  # the one that needs Triton

            self.fused_moe = fused_moe_peers(
                settings.fused_moe_source, shape, settings.dtype, settings.device
            )
        self.calls |= self.fused_moe
        if vllm:
            vllm.prepare(shape, seed=0)

    def _ours(self, layer: Layer, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return fused_experts(
            hidden,
            layer.w_gate_up,
            layer.w_down,
            ids,
            weights,
            backend=self.settings.backend,
            batch_invariant=self.settings.batch_invariant,
        )

    def measure(self, batch: int, rows: int) -> dict[str, Any]:
        """One point: correctness gate, interleaved rounds with new routing each, one JSON line."""
        settings, tokens = self.settings, batch * rows
        gated, not_run = self._gate(batch, rows)
        slow = {name: [seconds] for name, seconds in gated.items() if seconds > SLOW_S}
        not_captured = dict.fromkeys(slow, f"slower than {SLOW_S} s") if settings.graph else {}
        batches = [self._draw(batch, rows, ROUND_SEED + r) for r in range(settings.rounds)]
        variants = {}
        for name in ("moesd", *(name for name in gated if name not in slow)):
            variants[name], why_eager = self._variant(self.calls[name], batches)
            if why_eager:
                not_captured[name] = why_eager
        if self.vllm:
            worker = self.vllm
            variants["vllm"] = lambda r: worker.call(
                batch, rows, settings.routing, ROUND_SEED + r, settings.union_ratio
            )["seconds"]
        if self.probe:  # as variants in the same rounds; their samples are rates, not times
            variants |= {"read": self.probe.read, "peak": self.probe.peak}
        with torch.inference_mode():
            samples = interleaved(
                variants,
                rounds=settings.rounds,
                device=settings.device,
                before=self.flush,
                budget_s=settings.budget_s,
            )
            launches = launch_seconds(
                self._eager(self.calls["moesd"], batches),
                min(PROFILED_ROUNDS, settings.rounds),
                self.flush,
                settings.device,
            )
        turns = [self._turn(batches, round_) for round_ in range(len(samples["moesd"]))]
        distinct = [sum(b.distinct for b in turn) / len(turn) for turn in turns]
        rates = {name: samples.pop(name) for name in RATES if name in samples}
        remarks: dict[str, dict[str, Any]] = {
            "not_captured": not_captured,
            "not_run": not_run,
            "fused_moe": {
                name: peer.describe(self.shape, tokens, settings.dtype)
                for name, peer in self.fused_moe.items()
            },
        }
        return self._record(batch, rows, distinct, samples | slow, launches, rates, remarks)

    def _draw(self, batch: int, rows: int, seed: int) -> Batch:
        s = self.settings
        return make_batch(
            self.shape, batch, rows, s.routing, s.dtype, s.device, seed, s.union_ratio
        )

    def _turn(self, batches: Sequence[Batch], round_: int) -> list[Batch]:
        """What a round gives to the layers of the stack, one batch each."""
        return [batches[(round_ + index) % len(batches)] for index in range(len(self.layers))]

    def _eager(self, call: LayerCall, batches: Sequence[Batch]) -> Callable[[int], object]:
        def one(round_: int) -> float:
            b = batches[round_]
            run = partial(call, self.layers[0], b.hidden, b.topk_ids, b.topk_weights)
            # Timed here, as vLLM's worker times its own call: with cold caches even looking up the
            # round's tensors costs several microseconds.
            return seconds_of(run, self.settings.device)[0]

        return one

    def _variant(
        self, call: LayerCall, batches: Sequence[Batch]
    ) -> tuple[Callable[[int], object], str | None]:
        """The timed callable, and why it replays no graph although one was asked for."""
        if not self.settings.graph:
            return self._eager(call, batches), None
        try:
            stack = CapturedStack(call, self.layers, batches[0])
        except RuntimeError as error:  # a peer that synchronises cannot be captured
            torch.cuda.synchronize()  # raises where the device did not survive it
            return self._eager(call, batches), _first_line(error)
        return lambda round_: stack.seconds(self._turn(batches, round_)), None

    def _pair_bytes(self, tokens: int) -> int:
        return tokens * self.shape.K * self.shape.expert_bytes(self.settings.dtype.itemsize)

    def _gate(self, batch_size: int, rows: int) -> tuple[dict[str, float], dict[str, str]]:
        """Refuse to time a variant whose output is not ours up to rounding.

        Returns:
            Seconds that each peer's call took, cold; and why the others cannot be called.

        Raises:
            RuntimeError: names the variant and its relative error.
        """
        settings = self.settings
        # Peers round gate_up, activation and output to the storage type: 4 roundings at most.
        tolerance = 4 * torch.finfo(settings.dtype).eps
        batch = self._draw(batch_size, rows, seed=0)
        seconds: dict[str, float] = {}
        not_run: dict[str, str] = {}
        inputs = (self.layers[0], batch.hidden, batch.topk_ids, batch.topk_weights)
        with torch.inference_mode():
            ours = self._ours(*inputs).float()
            for name, call in self.calls.items():
                too_big = self._pair_bytes(len(ours)) > BATCHED_LIMIT_BYTES
                if call == self._ours or (name == "batched_mm" and too_big):
                    continue
                timed = partial(seconds_of, partial(call, *inputs), settings.device)
                try:
                    spent, theirs = timed()
                    if spent > SLOW_S:  # a first call may have built primitives: time another
                        spent, theirs = timed()
                except Exception as lack:  # whatever a peer lacks here must not cost ours its line
                    not_run[name] = f"{type(lack).__name__}: {_first_line(lack)}"
                    logger.warning("%s does not run at T=%d: %s", name, len(ours), not_run[name])
                    continue
                seconds[name], theirs = spent, theirs.float()
                error = ((ours - theirs).norm() / theirs.norm()).item()
                if not error <= tolerance:
                    raise RuntimeError(f"{name} differs from moesd by {error:.2e} at T={len(ours)}")
        if self.vllm:
            answer = self.vllm.call(batch_size, rows, settings.routing, 0, settings.union_ratio)
            error = abs(answer["norm"] / ours.norm().item() - 1)
            if not error <= tolerance:
                raise RuntimeError(f"vllm's output norm differs by {error:.2e} at T={len(ours)}")
        return seconds, not_run

    def _record(
        self,
        batch: int,
        rows: int,
        distinct_by_round: list[float],
        samples: dict[str, list[float]],
        launches: dict[str, float],
        rates: dict[str, list[float]],
        remarks: dict[str, dict[str, Any]],
    ) -> dict[str, Any]:
        settings, tokens = self.settings, batch * rows
        dtype = str(settings.dtype).removeprefix("torch.")
        count = len(distinct_by_round)
        reads = rates.get("read") or [self.ceilings.read] * count
        peaks = rates.get("peak") or [self.ceilings.peak[dtype]] * count
        floors = [
            floor_seconds(self.shape, tokens, *ceilings, settings.dtype.itemsize)
            for ceilings in zip(distinct_by_round, reads, peaks, strict=True)
        ]
        distinct = sum(distinct_by_round) / count
        moved = layer_bytes(self.shape, tokens, distinct, settings.dtype.itemsize)
        ours = samples["moesd"]
        median = summarize(ours).median
        correlated = settings.routing == "correlated"
        return self.recorder.write(
            "kernel",
            shape=list(self.shape),
            dtype=dtype,
            routing=settings.routing,
            union_ratio=settings.union_ratio if correlated else None,
            backend=settings.backend,
            batch_invariant=settings.batch_invariant,
            graph=settings.graph,
            **remarks,
            B=batch,
            gamma=rows - 1,
            T=tokens,
            distinct=distinct,
            bytes=moved,
            floor_s=summarize(floors).median,
            of_roof=summarize([f / s for f, s in zip(floors, ours, strict=True)]).median,
            gb_per_s=moved / median / 1e9,
            read_bandwidth=summarize(reads).median,
            peak=summarize(peaks).median,
            seconds={name: summarize(s).as_dict() for name, s in samples.items()},
            launches_s=launches,
            ratio={
                name: summarize([a / b for a, b in zip(s, ours, strict=False)]).median
                for name, s in samples.items()
                if name != "moesd"
            },
        )


def _first_line(error: Exception) -> str:
    return (str(error) or "no reason given").splitlines()[0]


def efficiency(times: dict[tuple[int, int], float], batch: int, rows: int) -> float:
    """Target efficiency T(B, 1) / T(B, rows); NaN when T(B, 1) was not measured."""
    base = times.get((batch, 1))
    return base / times[batch, rows] if base else math.nan
