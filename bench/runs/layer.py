"""One MoE layer timed at many (B, gamma): ours, peers and the roofline on the same batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.measure.ceilings import CeilingProbe, Ceilings
from bench.measure.graph import CapturedStack, LayerCall, stack_size
from bench.measure.launches import launch_seconds
from bench.measure.record import Recorder
from bench.measure.timer import CacheFlusher, interleaved, seconds_of
from bench.peers.experts_transformers import TransformersExperts
from bench.peers.vllm_experts import VllmExperts
from bench.runs.layer_record import Samples, Settings, layer_fields
from bench.workloads.layer import Batch, Layer, make_batch, make_layer
from bench.workloads.shapes import Shape
from bench.workloads.stored import formats_of
from moesd_kernels import ExpertsSpec, fused_experts

if TYPE_CHECKING:
    from bench.peers.fused_moe_triton import FusedMoeTriton

logger = logging.getLogger(__name__)

BATCHED_LIMIT_BYTES = 4 * 2**30  # batched_mm copies the weights of every (token, expert) pair
ROUND_SEED = 1_000
PROFILED_ROUNDS = 5
RATES = ("read", "peak")  # samples of the ceilings, taken as variants
ROUNDED = "int8_activations"  # ours again, with activations of eight bits
SLOW_S = 1.0  # a peer this slow is timed once, in its correctness gate


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
        weights = shape.E * shape.expert_bytes(settings.weight_bytes)
        count = stack_size(weights) if settings.graph else 1
        self.layers = [
            make_layer(
                *(shape, settings.dtype, settings.device, seed, settings.weight_format),
                group=settings.group,
            )
            for seed in range(count)
        ]
        self.flush = CacheFlusher(settings.device)
        on_cpu = settings.device.type == "cpu"
        self.probe = CeilingProbe(settings.dtype) if on_cpu else None
        self.calls: dict[str, LayerCall] = {"moesd": self._ours}
        if settings.weight_format != "plain":
            self.calls["plain"] = self._plain
            weight_format, down_format = formats_of(settings.weight_format)
            spec = ExpertsSpec(weight_format=weight_format, down_format=down_format)
            if on_cpu and spec.integers:
                self.calls[ROUNDED] = partial(self._stored, rounded=True)
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
        return (self._plain if layer.stored is None else self._stored)(layer, hidden, ids, weights)

    def _stored(
        self,
        layer: Layer,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        rounded: bool = False,
        backend: str | None = None,
    ) -> Tensor:
        assert layer.stored is not None
        stored, scales = layer.stored[:2], layer.stored[4:]
        weight_format, down_format = formats_of(self.settings.weight_format)
        return fused_experts(
            *(hidden, *stored, ids, weights),
            gate_up_scale=scales[0],
            down_scale=scales[1],
            weight_format=weight_format,
            down_format=down_format,
            int8_activations=rounded,
            backend=backend or self.settings.backend,
            batch_invariant=self.settings.batch_invariant,
        )

    def _plain(self, layer: Layer, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return fused_experts(
            *(hidden, layer.w_gate_up, layer.w_down, ids, weights),
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
            seconds = interleaved(
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
        turns = [self._turn(batches, round_) for round_ in range(len(seconds["moesd"]))]
        rates = {name: seconds.pop(name) for name in RATES if name in seconds}
        samples = Samples(
            seconds=seconds | slow,
            distinct=[sum(b.distinct for b in turn) / len(turn) for turn in turns],
            rates=rates,
            launches=launches,
            remarks={
                "not_captured": not_captured,
                "not_run": not_run,
                "fused_moe": {
                    name: peer.describe(self.shape, tokens, settings.dtype)
                    for name, peer in self.fused_moe.items()
                },
            },
        )
        fields = layer_fields(self.shape, batch, rows, settings, self.ceilings, samples)
        return self.recorder.write("kernel", **fields)

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
                defined = ours
                if name == ROUNDED:
                    defined = self._stored(*inputs, rounded=True, backend="torch").float()
                error = ((defined - theirs).norm() / theirs.norm()).item()
                if not error <= tolerance:
                    raise RuntimeError(f"{name} differs from moesd by {error:.2e} at T={len(ours)}")
        if self.vllm:
            answer = self.vllm.call(batch_size, rows, settings.routing, 0, settings.union_ratio)
            error = abs(answer["norm"] / ours.norm().item() - 1)
            if not error <= tolerance:
                raise RuntimeError(f"vllm's output norm differs by {error:.2e} at T={len(ours)}")
        return seconds, not_run


def _first_line(error: Exception) -> str:
    return (str(error) or "no reason given").splitlines()[0]
