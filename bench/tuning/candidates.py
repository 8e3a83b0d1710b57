"""Tilings that ``bench tune`` tries: few, and as different from each other as they can be.

The model that chooses tiles has not met a GPU, so its second choice is much like its first. This
list is picked by hand to differ where the model may be wrong: bytes under way (steps of 64 to 256
columns, 3 to 5 of them), weight rows a program (32 to 128), warps, which operand is the 64-row one,
programs that share a tile's columns, and the height of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moesd_kernels.experts.triton.config import Gemm, block_rows, fits, group_rows
from moesd_kernels.experts.triton.types import Device, LayerShape, LayerTiles, TileConfig

# block_n, block_k, num_stages, num_warps, split_k, swap_ab; the first is tried at every height.
GATE_UP = (
    (64, 128, 3, 4, 1, False),
    (64, 128, 4, 4, 1, True),
    (64, 128, 3, 4, 1, True),
    (32, 128, 5, 4, 1, False),
    (64, 64, 5, 4, 1, False),
    (64, 64, 5, 4, 1, True),
    (128, 64, 4, 4, 1, True),
    (128, 64, 4, 8, 1, False),
    (32, 128, 4, 4, 1, False),
    (64, 256, 2, 4, 1, True),
    (64, 128, 5, 4, 1, True),
    (32, 256, 4, 4, 1, False),
    (128, 64, 4, 8, 1, True),
    (64, 128, 4, 8, 1, False),
    (64, 128, 3, 8, 1, True),
    (128, 128, 3, 8, 1, True),
    (64, 64, 5, 8, 1, False),
    (64, 64, 4, 8, 1, True),
    (32, 128, 4, 8, 1, False),
)
DOWN = (
    (64, 128, 4, 4, 1, False),
    (64, 128, 4, 4, 1, True),
    (128, 64, 4, 4, 1, True),
    (128, 128, 4, 4, 1, True),
    (64, 128, 5, 4, 2, False),
    (64, 256, 3, 4, 1, True),
    (64, 128, 6, 4, 1, True),
    (64, 128, 4, 4, 2, True),
    (64, 256, 4, 4, 1, False),
    (128, 128, 4, 8, 1, False),
    (32, 256, 5, 4, 1, False),
    (128, 64, 5, 4, 1, False),
    (64, 128, 4, 4, 4, False),
    (128, 128, 4, 8, 2, True),
    (32, 128, 5, 4, 1, False),
    (64, 128, 4, 4, 4, True),
)
# block_n, block_k, num_stages, num_warps of one token's kernels.
SINGLE_GATE_UP = (
    (8, 512, 4, 4),
    (16, 256, 6, 4),
    (8, 256, 6, 4),
    (16, 512, 3, 8),
    (32, 256, 4, 8),
    (4, 512, 6, 4),
    (8, 1024, 3, 8),
    (16, 256, 4, 8),
)
SINGLE_DOWN = (
    (8, 256, 8, 4),
    (16, 256, 5, 4),
    (8, 512, 5, 4),
    (16, 512, 5, 8),
    (4, 512, 8, 4),
    (8, 1024, 4, 8),
    (32, 256, 5, 8),
    (8, 256, 5, 2),
)
# Steps a split needs, or its program is all ramp.
MIN_STEPS = 4
# Scanning more pairs than this in every program of gate_up is not worth a launch.
MAX_INLINE_PAIRS = 1024


def heights(shape: LayerShape) -> list[int]:
    """Rows of a block worth trying, from that which holds every token or nearly: lower ones hold
    half of the mean.

    A lower block wastes fewer rows of the matrix instruction and leaves more shared memory to
    weights; experts that overflow it are read again, through the cache.
    """
    tallest, mean = block_rows(shape), shape.T * shape.K / shape.E
    return [tallest, *(m for m in (64, 32, 16) if m < tallest and 2 * m >= mean)]


def gate_up_choices(
    shape: LayerShape, gemm: Gemm, start: LayerTiles, device: Device
) -> list[LayerTiles]:
    """``start`` with other tiles of gate_up; and of other heights, with its own and the list's
    first three."""
    choices = [
        replace(start, gate_up=tile)
        for tile in _tiles(GATE_UP, start.block_m, start.gate_up.group_m, gemm, device)
    ]
    for height in heights(shape):
        if height != start.block_m:
            group_m = group_rows(shape, height)
            other = start.with_block_m(height).with_group_m(group_m)
            found = [
                replace(other, gate_up=t)
                for t in _tiles(GATE_UP[:3], height, group_m, gemm, device)
            ]
            own = [other] if fits(gemm, other.gate_up, device) else []
            choices[2:2] = [*own, *found]
    return choices


def down_choices(gemm: Gemm, start: LayerTiles, device: Device) -> list[LayerTiles]:
    """``start`` with other tiles of down, of its height."""
    tiles = _tiles(DOWN, start.block_m, start.down.group_m, gemm, device)
    return [replace(start, down=tile) for tile in tiles]


def inline_choices(shape: LayerShape, start: LayerTiles) -> list[LayerTiles]:
    """``start`` with the plan in a launch of its own if it was inline, and the reverse."""
    pairs = shape.T * shape.K
    if pairs > MAX_INLINE_PAIRS:
        return []
    return [replace(start, inline_pairs=0 if pairs <= start.inline_pairs else MAX_INLINE_PAIRS)]


def single_gate_up_choices(start: LayerTiles) -> list[LayerTiles]:
    """``start`` with other tiles of one token's gate_up, and with the matrix product instead."""
    tiles = [TileConfig(16, n, k, 1, warps, stages) for n, k, stages, warps in SINGLE_GATE_UP]
    return [replace(start, single_gate_up=tile) for tile in (*tiles, None)]


def single_down_choices(start: LayerTiles) -> list[LayerTiles]:
    """``start`` with other tiles of one token's down."""
    tiles = [TileConfig(16, n, k, 1, warps, stages) for n, k, stages, warps in SINGLE_DOWN]
    return [replace(start, single_down=tile) for tile in tiles]


def _tiles(
    rows: tuple[tuple[int, int, int, int, int, bool], ...],
    block_m: int,
    group_m: int,
    gemm: Gemm,
    device: Device,
) -> Iterator[TileConfig]:
    """Those of the list that fit shared memory and registers and have steps enough."""
    for n, k, stages, warps, split, swap in rows:
        tile = TileConfig(block_m, n, k, split, warps, stages, swap, group_m)
        # Tall tiles keep operands out of registers, which leaves more to accumulators.
        most = 128 if block_m == 128 else 64
        if fits(gemm, tile, device, most) and (split == 1 or MIN_STEPS * k * split <= gemm.K):
            yield tile


def gemms(shape: LayerShape, itemsize: int) -> tuple[Gemm, Gemm]:
    """gate_up and down as the model sees them, with the expected number of active experts."""
    active = shape.E * (1.0 - (1.0 - shape.K / shape.E) ** shape.T)
    rows = shape.T * shape.K / active
    return (
        Gemm(active, rows, shape.I, shape.H, 2, itemsize, False),
        Gemm(active, rows, shape.H, shape.I, 1, itemsize, True),
    )
