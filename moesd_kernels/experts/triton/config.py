"""Which tiles to use: an analytic model of a bandwidth-bound grouped product, or a tuned file.

``select_config`` is a pure function of the layer's shape, dtype and device. It depends on T only
through the bucket of tokens per expert and the height of a block, so that few kernels are compiled
and a table stays small.
The model's constants are estimates until a file tuned on the device replaces its choices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .tuned import tuned_tiles
from .types import Device, LayerShape, LayerTiles, TileConfig

# Up to here a block holds every token, so that no expert is read twice however tokens are routed.
READ_ONCE_TOKENS = 64
# Beyond, a block holds the mean share of tokens and this many standard deviations of independent
# routing: one expert in 700 overflows. Draft tokens of a sequence route alike, which multiplies the
# variance by 2.2 (by 3 with 2 of 8 experts): at most one expert in 40 overflows at five tokens a
# sequence. An overflow costs a second program on the same weight tile, next in launch order, so
# that it reads the cache; a block twice as high would cost every program of every expert twice the
# arithmetic and more shared memory.
DEVIATIONS = 3.0
# Blocks whose equal tiles are adjacent in launch order where an expert may have several blocks.
GROUP_M = 4
# Bytes a multiprocessor must have under way to keep DRAM busy: latency times bandwidth, with slack.
BYTES_IN_FLIGHT = 64 * 1024
# Seconds from a program's start to its first product, hidden only by its neighbours.
RAMP = 1.5e-6
# Seconds of a step's barrier and issue, hidden likewise: what makes longer steps better.
STEP = 5e-8
# What one multiprocessor can draw relative to its share, when others have finished.
DRAW = 1.25
# Bandwidth of the second-level cache relative to DRAM: activations and partial sums live there.
CACHE_RATIO = 2.0
# Fraction of the matrix peak that small tiles reach.
MATRIX_EFFICIENCY = 0.55
# Stages at most of gate_up and of down, which leaves room for a second program.
HOPPER_STAGES = 5, 4
# The table that a program scans for its rows costs it more than a launch from here on.
HOPPER_INLINE_PAIRS = 64
# Bytes of a weight row in one step of the one-token kernels: 16 for each thread of a warp.
SINGLE_ROW_BYTES = 512


@dataclass(frozen=True, slots=True)
class Gemm:
    """One grouped product as the model sees it: ``experts`` x [rows, K] x ``[N, K]`` (x
    streams).

    Activations have ``itemsize`` bytes, and so do weights unless they are stored in fewer bits.
    """

    experts: float
    rows: float
    N: int
    K: int
    streams: int
    itemsize: int
    may_split: bool
    weight_bits: int | None = None

    @property
    def weight_bytes(self) -> float:
        """Bytes of a stored weight, without its scales."""
        return self.itemsize if self.weight_bits is None else self.weight_bits / 8


def select_config(
    shape: LayerShape, dtype: torch.dtype, device: Device, *, batch_invariant: bool = False
) -> LayerTiles:
    """Tiles of both products for a layer.

    With ``batch_invariant`` a row goes through the same instructions in the same order whatever
    else is in the batch: the tiles do not depend on T, but for the order of programs and, on
    Hopper, the height of a block, which is there the width of an instruction that sums every
    column alike (``hopper_tiles``).

    Args:
        shape: the layer and the number of tokens entering it.
        dtype: of activations, and of weights that are not quantised.
        device: what the tiles must fit.
        batch_invariant: give up choosing by T.

    Returns:
        The tuned file's choice for this device and layer at the nearest number of tokens, else the
        model's.
        The model's blocks are ``block_rows`` high; a file's may be lower.
    """
    if batch_invariant:
        if _has_wgmma(device, dtype):
            return hopper_tiles(shape, dtype, device)
        fixed = model_choice(replace(shape, T=READ_ONCE_TOKENS), dtype, device)
        return fixed.with_group_m(group_rows(shape, fixed.block_m))
    tuned = tuned_tiles(device.name, shape.layer, str(dtype), shape.T)
    if tuned is not None and shape.weight_bits == (None, None):  # nobody has tuned quantised ones
        return tuned.with_block_m(min(tuned.block_m, block_rows(shape)))
    return model_choice(shape, dtype, device)


@functools.lru_cache(maxsize=1024)
def model_choice(shape: LayerShape, dtype: torch.dtype, device: Device) -> LayerTiles:
    """The configuration for a layer nobody tuned: on Hopper by rule, else by the model."""
    if _has_wgmma(device, dtype):
        return hopper_tiles(shape, dtype, device)
    return _model_config(_representative(shape), block_rows(shape), dtype, device)


def _has_wgmma(device: Device, dtype: torch.dtype) -> bool:
    return device.capability == 90 and dtype.itemsize == 2


@functools.lru_cache(maxsize=4096)
def hopper_tiles(shape: LayerShape, dtype: torch.dtype, device: Device) -> LayerTiles:
    """What tuning three layers on an H200 found at nearly every T: weights as the 64 rows of wgmma,
    long steps, and one program a multiprocessor that has most of its shared memory under way.

    Only the height of a block and the number of stages follow T. Low blocks were best also where a
    few experts overflow them and are read again, through the cache. The height is the instruction's
    width (64 x height x 16); each of its columns is summed in the same order whatever the width is,
    which ``tests/moesd_kernels/experts/triton/test_gpu.py`` holds bit by bit.
    """
    block_m = likely_rows(shape)
    group_m = group_rows(shape, block_m)
    sizes = (shape.I, shape.H, 1 + shape.gated), (shape.H, shape.I, 1)
    gate_up, down = (
        Gemm(1.0, 1.0, N, K, streams, dtype.itemsize, False, bits)
        for (N, K, streams), bits in zip(sizes, shape.weight_bits, strict=True)
    )

    def tile(gemm: Gemm, most: int) -> TileConfig:
        if block_m == 128:  # many tokens: arithmetic counts, and two groups of warps share them
            return TileConfig(block_m, 128, 64, 1, 8, 4, True, group_m)
        stages = range(most, 1, -1)
        tiles = (TileConfig(block_m, 64, 128, 1, 4, n, True, group_m) for n in stages)
        return next(t for t in tiles if shared_bytes(gemm, t) <= device.shared_bytes - 2048)

    itemsize = dtype.itemsize
    return LayerTiles(
        tile(gate_up, HOPPER_STAGES[0]),
        tile(down, HOPPER_STAGES[1]),
        _single_gate_up(shape, itemsize, device),
        _single_down(shape, itemsize, device),
        inline_pairs=HOPPER_INLINE_PAIRS,
    )


def bucket(shape: LayerShape) -> float:
    """Tokens per expert, rounded up to a power of two."""
    return 2.0 ** math.ceil(math.log2(shape.T * shape.K / shape.E))


def block_rows(shape: LayerShape) -> int:
    """BLOCK_M: holds any expert's tokens up to READ_ONCE_TOKENS, then nearly any expert's."""
    if shape.T <= READ_ONCE_TOKENS:
        return max(16, _next_power_of_2(shape.T))
    return likely_rows(shape)


def likely_rows(shape: LayerShape) -> int:
    """Rows of a block that holds nearly any expert's tokens."""
    share = shape.K / shape.E
    mean = shape.T * share
    most = mean + DEVIATIONS * math.sqrt(mean * max(0.0, 1.0 - share))
    return min(128, max(16, _next_power_of_2(math.ceil(most))))


def group_rows(shape: LayerShape, block_m: int) -> int:
    """GROUP_M: where an expert may have several blocks, those that read one tile run together."""
    return 1 if block_m >= shape.T else GROUP_M


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _representative(shape: LayerShape) -> LayerShape:
    """The largest T of a bucket stands for all of it."""
    return replace(shape, T=max(1, int(bucket(shape) * shape.E / shape.K)))


@functools.lru_cache(maxsize=1024)
def _model_config(
    shape: LayerShape, block_m: int, dtype: torch.dtype, device: Device
) -> LayerTiles:
    active = shape.E * (1.0 - (1.0 - min(1.0, shape.K / shape.E)) ** shape.T)
    rows = shape.T * shape.K / active
    itemsize, (up_bits, down_bits) = dtype.itemsize, shape.weight_bits
    gate_up = Gemm(active, rows, shape.I, shape.H, 1 + shape.gated, itemsize, False, up_bits)
    down = Gemm(active, rows, shape.H, shape.I, 1, itemsize, True, down_bits)
    group_m = group_rows(shape, READ_ONCE_TOKENS)

    def best(gemm: Gemm) -> TileConfig:
        choices = [c for c in _candidates(gemm, block_m, group_m, device) if fits(gemm, c, device)]
        return min(choices, key=lambda c: predicted_seconds(gemm, c, device))

    return LayerTiles(
        best(gate_up),
        best(down),
        _single_gate_up(shape, itemsize, device),
        _single_down(shape, itemsize, device),
    )


def _candidates(gemm: Gemm, block_m: int, group_m: int, device: Device) -> Iterator[TileConfig]:
    """Tiles worth considering; fp32 multiplies without matrix instructions and needs small ones."""
    half, quantised = gemm.itemsize == 2, gemm.weight_bits is not None
    # Blackwell's accumulators come from a memory of their own into registers all at once.
    most = 128 if device.capability < 100 else 64
    if quantised:  # Codes become numbers in registers. On Blackwell eight warps are given few.
        most = 64 if device.capability < 100 else 1024
    for block_n in ((128, 64, 32) if half else (32, 16))[quantised:]:
        for block_k in (128, 64) if half else (32,):
            for stages in (4, 3, 5) if half else (3,):
                for split in (1, 2, 4, 8) if gemm.may_split else (1,):
                    # Fewer steps than this and a program is all ramp.
                    if split > 1 and 8 * block_k * split > gemm.K:
                        continue
                    wide = block_m * block_n * gemm.streams >= 128 * most
                    yield TileConfig(
                        block_m=block_m,
                        block_n=block_n,
                        block_k=block_k,
                        split_k=split,
                        num_warps=8 if wide else 4,
                        num_stages=stages,
                        group_m=group_m,
                    )


def shared_bytes(gemm: Gemm, config: TileConfig) -> int:
    """Shared memory of one program: every stage of activations and weights as stored; quantised
    weights may go through it once more as numbers."""
    weights = gemm.streams * config.block_n * config.block_k
    stage = config.block_m * config.block_k * gemm.itemsize + math.ceil(weights * gemm.weight_bytes)
    again = 0 if gemm.weight_bits is None else weights * gemm.itemsize
    return config.num_stages * stage + again


def fits(gemm: Gemm, config: TileConfig, device: Device, most: int = 64) -> bool:
    """Whether a program fits the device's shared memory and its accumulators their registers."""
    accumulators = config.block_m * config.block_n * gemm.streams / (32 * config.num_warps)
    return shared_bytes(gemm, config) <= device.shared_bytes - 2048 and accumulators <= most


def predicted_seconds(gemm: Gemm, config: TileConfig, device: Device) -> float:
    """Time of one product: DRAM, balance over processors, latency, cache traffic, arithmetic."""
    shared = shared_bytes(gemm, config)
    resident = max(1, min(device.shared_bytes // shared, 16 // config.num_warps))
    stage = gemm.streams * config.block_n * config.block_k * gemm.weight_bytes
    in_flight = resident * (config.num_stages - 1) * stage
    bandwidth = device.bandwidth * min(1.0, in_flight / BYTES_IN_FLIGHT)

    tiles = gemm.experts * math.ceil(gemm.N / config.block_n) * config.split_k
    k_each = math.ceil(gemm.K / (config.block_k * config.split_k)) * config.block_k
    tile_bytes = gemm.streams * config.block_n * k_each * gemm.weight_bytes
    # The multiprocessor with the most tiles, at the bandwidth it can draw for itself.
    deepest = math.ceil(tiles / device.sms)
    balance = deepest * tile_bytes * device.sms / (DRAW * bandwidth)
    stream = max(tiles * tile_bytes / bandwidth, balance)

    latency = RAMP + STEP * k_each / config.block_k
    exposed = latency * max(1.0, deepest / resident) / resident
    reread = tiles * gemm.rows * k_each * gemm.itemsize
    partial = 2 * gemm.experts * gemm.rows * gemm.N * config.split_k * 4 if gemm.may_split else 0
    cached = (reread + partial) / (CACHE_RATIO * device.bandwidth)
    blocks = math.ceil(gemm.rows / config.block_m)
    flops = 2 * tiles * blocks * config.block_m * config.block_n * gemm.streams * k_each
    return max(stream, flops / (MATRIX_EFFICIENCY * device.matrix_flops)) + exposed + cached


def _single_gate_up(shape: LayerShape, itemsize: int, device: Device) -> TileConfig:
    """Tiles of the one-token gate_up."""
    return _single(shape.K, shape.I, shape.H, itemsize, shape.weight_bits[0], device)


def _single_down(shape: LayerShape, itemsize: int, device: Device) -> TileConfig:
    """Tiles of the one-token down projection; few programs need more stages under way each."""
    tile = _single(1, shape.H, shape.I, itemsize, shape.weight_bits[1], device)
    few = math.ceil(shape.H / tile.block_n) <= 2 * device.sms
    return replace(tile, num_stages=8) if few else tile


def _single(
    pairs: int, rows: int, columns: int, itemsize: int, bits: int | None, device: Device
) -> TileConfig:
    """A one-token tile: 16 rows (of each half), unless 8 balance better, in pieces of 512 bytes,
    which a warp loads at once. Of quantised rows twice as many columns fill as many threads."""
    programs = {n: pairs * math.ceil(rows / n) for n in (16, 8)}
    block_n = min(programs, key=lambda n: math.ceil(programs[n] / device.sms) * n)
    block_k = min(SINGLE_ROW_BYTES // itemsize, _next_power_of_2(max(64, columns)))
    if bits is not None:
        block_n, block_k = 8, 2 * SINGLE_ROW_BYTES // itemsize
    return TileConfig(block_m=16, block_n=block_n, block_k=block_k, num_stages=4)
