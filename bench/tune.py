"""``bench tune``: measure tiles on this GPU and write the file the selector reads.

For every layer and number of tokens the selector's own candidates, best first by its model, are
timed in CUDA graphs over rotated weights: first gate_up's, then down's (at T = 1 the one-token
form's). A candidate that changes the result beyond rounding is dropped. Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench.graph import CapturedStack, stack_size
from bench.layer import Batch, Layer, make_batch, make_layer
from bench.routing import DEFAULT_UNION_RATIO
from bench.shapes import Shape, parse_shape
from moesd_kernels.triton.config import (
    Gemm,
    block_rows,
    bucket,
    fits,
    predicted_seconds,
    select_config,
)
from moesd_kernels.triton.tuned import FOLDER, config_path, entry_of
from moesd_kernels.triton.types import H200, Device, GemmConfig, LayerShape, MoEConfig

TOKENS = "1,2,4,8,16,32,64,128,256,512"
DISTINCT_BATCHES = 8
# Results of two tilings differ by the order of fp32 sums and one rounding to the output's dtype.
ROUNDINGS = 4.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench tune``."""
    parser.add_argument("--shape", action="append", required=True, help="name or E,K,H,I")
    parser.add_argument("--tokens", default=TOKENS, help="one T for each bucket to tune")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--candidates", type=int, default=16, help="per product, best by model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for each shape")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the file is written")
    parser.add_argument("--force", action="store_true", help="tune entries the file already has")
    parser.add_argument("--dry-run", action="store_true", help="list candidates; needs no GPU")


def run(args: argparse.Namespace) -> int:
    """Tune every shape; entries are written as they are found, so a stopped run can go on."""
    tokens = [int(text) for text in args.tokens.split(",")]
    shapes = [parse_shape(text) for text in args.shape]
    dtype = getattr(torch, args.dtype)
    if args.dry_run:
        for shape, T in itertools.product(shapes, tokens):
            _print_candidates(LayerShape(*shape, T), dtype, args.candidates)
        return 0
    if not torch.cuda.is_available():
        raise ValueError("tune needs a CUDA device, found none; --dry-run lists the candidates")
    for shape in shapes:
        _tune_shape(shape, tokens, dtype, args)
    return 0


def candidates(
    gemm: Gemm, start: GemmConfig, device: Device, limit: int, *, single: bool = False
) -> list[GemmConfig]:
    """`start` and the `limit` tilings the model likes best, of the height of `start`."""
    grid = _single_grid(start) if single else _grid(start, gemm.may_split)
    if not single:
        grid = (tile for tile in grid if fits(gemm, tile, device))
    ranked = sorted(grid, key=lambda tile: predicted_seconds(gemm, tile, device))
    return [start, *(tile for tile in ranked if tile != start)][: limit + 1]


def _grid(start: GemmConfig, may_split: bool) -> Iterator[GemmConfig]:
    for n, k, stages, warps, split, swap in itertools.product(
        (32, 64, 128), (64, 128, 256), (3, 4, 5, 6), (4, 8), (1, 2, 4, 8), (False, True)
    ):
        # Swapped, a tile's weight rows must fill the 64-row instruction.
        if (split > 1 and not may_split) or (swap and n < 64):
            continue
        yield replace(
            start,
            block_n=n,
            block_k=k,
            num_stages=stages,
            num_warps=warps,
            split_k=split,
            swap_ab=swap,
        )


def _single_grid(start: GemmConfig) -> Iterator[GemmConfig]:
    for n, k, stages, warps in itertools.product((8, 16, 32), (256, 512, 1024), (3, 4, 5), (4, 8)):
        # Accumulators and a stage are n * k elements; 48 KB of stages fit every device.
        if 512 <= n * k <= 2048 * warps and n * k * 2 * stages <= 96 * 1024:
            yield replace(start, block_n=n, block_k=k, num_stages=stages, num_warps=warps)


def _gemms(shape: LayerShape, itemsize: int) -> tuple[Gemm, Gemm]:
    """gate_up and down as the model sees them, with the expected number of active experts."""
    active = shape.E * (1.0 - (1.0 - shape.K / shape.E) ** shape.T)
    rows = shape.T * shape.K / active
    return (
        Gemm(active, rows, shape.I, shape.H, 2, itemsize, False),
        Gemm(active, rows, shape.H, shape.I, 1, itemsize, True),
    )


def _print_candidates(shape: LayerShape, dtype: torch.dtype, limit: int) -> None:
    gate_up, down = _gemms(shape, dtype.itemsize)
    chosen = select_config(shape, dtype, H200)
    for name, gemm, start in (("gate_up", gate_up, chosen.gate_up), ("down", down, chosen.down)):
        for tile in candidates(gemm, start, H200, limit):
            micros = 1e6 * predicted_seconds(gemm, tile, H200)
            print(f"{shape.layer} T={shape.T} {name} {micros:8.1f} us predicted  {tile}")


class _Bench:
    """One shape's weights and inputs, and the time of a configuration on them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, rounds: int) -> None:
        device = torch.device("cuda")
        stack = stack_size(shape.E * shape.expert_bytes(dtype.itemsize))
        self.shape, self.dtype, self.rounds, self.device = shape, dtype, rounds, device
        self.layers = [make_layer(shape, dtype, device, seed) for seed in range(stack)]

    def batches(self, T: int) -> list[Batch]:
        """Inputs of T tokens with different routings."""
        return [
            make_batch(
                self.shape, T, 1, "uniform", self.dtype, self.device, seed, DEFAULT_UNION_RATIO
            )
            for seed in range(DISTINCT_BATCHES)
        ]

    def output(self, batch: Batch, config: MoEConfig) -> Tensor:
        """The first layer's result."""
        return _caller(config)(self.layers[0], batch.hidden, batch.topk_ids, batch.topk_weights)

    def seconds(self, batches: list[Batch], config: MoEConfig) -> float:
        """Median seconds of a layer in a graph."""
        captured = CapturedStack(_caller(config), self.layers, batches[0])
        turns = [batches[r % len(batches) :] + batches[: r % len(batches)] for r in range(9)]
        times = [captured.seconds(turns[r % len(turns)]) for r in range(self.rounds)]
        return statistics.median(times)


def _caller(config: MoEConfig) -> Callable[[Layer, Tensor, Tensor, Tensor], Tensor]:
    from moesd_kernels.triton.launch import fused_experts_triton

    return lambda layer, hidden, ids, weights: fused_experts_triton(
        hidden, layer.w_gate_up, layer.w_down, ids, weights, config=config
    )


def _tune_shape(shape: Shape, tokens: list[int], dtype: torch.dtype, args: Any) -> None:
    from moesd_kernels.triton.device import device_of

    device = device_of(torch.device("cuda", torch.cuda.current_device()))
    path = config_path(device.name, args.folder)
    bench = _Bench(shape, dtype, args.rounds)
    end = time.perf_counter() + args.budget
    for number, T in enumerate(tokens):
        layer = LayerShape(*shape, T)
        if not args.force and has_entry(path, layer, str(dtype)):
            continue
        # What earlier buckets did not use goes to those that are left.
        share = (end - time.perf_counter()) / (len(tokens) - number)
        if share <= 0:
            print(f"{shape}: out of time before T = {T}; run again to go on")
            return
        best, micros, model_micros = _tune_tokens(bench, layer, device, args.candidates, share)
        write_entry(path, device.name, entry_of(layer, str(dtype), bucket(layer), best))
        print(f"{shape} T={T}: {micros:.1f} us, the model's choice {model_micros:.1f} us")


def _tune_tokens(
    bench: _Bench, shape: LayerShape, device: Device, limit: int, budget: float
) -> tuple[MoEConfig, float, float]:
    """The best configuration found, its microseconds, and those of the model's choice."""
    batches = bench.batches(shape.T)
    best = select_config(shape, bench.dtype, device).with_block_m(block_rows(shape))
    expected = bench.output(batches[0], best).float()
    first = fastest = bench.seconds(batches, best)
    gate_up, down = _gemms(shape, bench.dtype.itemsize)
    last = "single_down" if shape.T == 1 else "down"
    for name, gemm in (("gate_up", gate_up), (last, down)):
        end = time.perf_counter() + budget / 2
        tiles = candidates(gemm, getattr(best, name), device, limit, single=name == "single_down")
        for tile in tqdm(tiles[1:], desc=f"T={shape.T} {name}", leave=False):
            if time.perf_counter() > end:
                break
            config = replace(best, **{name: tile})
            try:
                if not close(bench.output(batches[0], config).float(), expected, bench.dtype):
                    print(f"dropped, wrong result: {name} {tile}")
                    continue
                seconds = bench.seconds(batches, config)
            except Exception as error:  # whatever a compiler or launch refuses is no candidate
                print(f"dropped, {type(error).__name__}: {name} {tile}")
                continue
            if seconds < fastest:
                best, fastest = config, seconds
    return best, 1e6 * fastest, 1e6 * first


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether every element is within a few roundings of its row's scale."""
    scale = expected.abs().amax(dim=-1, keepdim=True)
    bound = ROUNDINGS * torch.finfo(dtype).eps * scale
    return bool(((got - expected).abs() <= bound).all())


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"entries": []}


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in ("E", "K", "H", "I", "gated", "dtype", "bucket"))


def has_entry(path: Path, shape: LayerShape, dtype: str) -> bool:
    """Whether the file has tiles for this layer, dtype and bucket."""
    key = (*shape.layer, dtype, bucket(shape))
    return any(_key(entry) == key for entry in _read(path)["entries"])


def write_entry(path: Path, device_name: str, entry: dict[str, Any]) -> None:
    """Put one entry into the device's file, in place of one with the same key."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = None
    others = [old for old in _read(path)["entries"] if _key(old) != _key(entry)]
    entries = sorted([*others, entry], key=_key)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"device": device_name, "triton": triton_version, "entries": entries}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
