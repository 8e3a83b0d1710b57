"""Tiles of a matrix product whose order of sums depends on its depth alone.

The columns of a weight row are cut into parts (``part_columns``); a part is summed step by step,
the parts in order. Whether one program takes all parts of a tile or each part has a program of its
own changes no bit of the result, so the choice may follow T, N and the device freely.

The constants are estimates until a device has measured them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from moesd_kernels.experts.triton.types import Device, TileConfig

# Columns of a step and, at least, of a part: a part is then under way as a whole from its start.
STEP = 128
PART_STEPS = 4
# More parts would cost more to sum than their programs bring.
MAX_PARTS = 8
# Tiles that are counted to their last part; a product with more does not need to be split.
MAX_SPLIT_TILES = 1024
# Token blocks of one weight tile that run together.
GROUP_M = 8
# Bytes a second that one multiprocessor draws, alone and when all do: both by the cache's width.
ALONE = 8e10
TOGETHER = 4.5e10
# Seconds from a part's last product to the sum of all: a store, a counter and a load, one by one.
REDUCTION = 1.5e-6
# Steps under way that reach the measured read rate.
STAGES = 5


@dataclass(frozen=True, slots=True)
class Product:
    """x ``[T, K]`` times w ``[N, K]`` transposed."""

    T: int
    N: int
    K: int
    dtype: torch.dtype


def part_columns(K: int) -> int:
    """Columns of a part: the order of a row's sum, a function of nothing else.

    K is then cut into at most MAX_PARTS equal parts, the last of which may be shorter.
    """
    steps = max(1, math.ceil(K / STEP))
    parts = min(MAX_PARTS, math.ceil(steps / PART_STEPS))
    return math.ceil(steps / parts) * STEP


def part_count(K: int) -> int:
    """Parts of a row of K columns, one at least."""
    return max(1, math.ceil(K / part_columns(K)))


@functools.lru_cache(maxsize=4096)
def linear_tiles(product: Product, device: Device) -> TileConfig:
    """The tiles with the least predicted time; ``split_k`` is 1 or the number of parts.

    Nothing here may change the order of a row's sum: the instruction does not change with T but in
    its width (``experts.triton.config.hopper_tiles``), and a step is as long for every tile.
    """
    parts = part_count(product.K)
    # 64 weight rows are wgmma's; twice as many halve the reading of tokens, where they are many.
    rows = (64, 128) if min(product.T, _most_tokens(product, device)) > 32 else (64,)
    tiles = [_tile(product, n, split, device) for n in rows for split in (1, parts)]
    usable = [t for t in tiles if t.split_k == 1 or tile_count(product, t) <= MAX_SPLIT_TILES]
    return min(usable, key=lambda tile: predicted_seconds(product, tile, device))


def _most_tokens(product: Product, device: Device) -> int:
    """Tokens of a tile at most: all tiles of a device and dtype must use one instruction.

    On Blackwell that is the warp-wide one, which wider tiles would leave: its own keeps sums in a
    memory of their own, where each part's end would have to be fetched.
    """
    if product.dtype == torch.float32 or device.capability >= 100:
        return 32
    return 128 if device.capability >= 90 else 64


def _tile(product: Product, block_n: int, split: int, device: Device) -> TileConfig:
    """Low tiles take half of the shared memory, which leaves room for a second program."""
    block_m = min(_most_tokens(product, device), max(16, 1 << (product.T - 1).bit_length()))
    fp32 = product.dtype == torch.float32
    block_n, block_k = (32, 32) if fp32 else (block_n, STEP)
    room = device.shared_bytes // (2 if block_m <= 32 else 1) - 2048
    stages = room // ((block_m + block_n) * block_k * product.dtype.itemsize)
    wgmma = device.capability == 90 and not fp32
    return TileConfig(
        block_m,
        block_n,
        block_k,
        split_k=split,
        num_warps=8 if block_n > 64 or (block_m > 16 and not wgmma) else 4,
        num_stages=max(2, min(STAGES, stages)),
        swap_ab=wgmma,
        group_m=GROUP_M,
    )


def tile_count(product: Product, tile: TileConfig) -> int:
    """Tiles of a product; each is ``split_k`` programs."""
    return math.ceil(product.T / tile.block_m) * math.ceil(product.N / tile.block_n)


def predicted_seconds(product: Product, tile: TileConfig, device: Device) -> float:
    """The longest of DRAM, of what the busiest multiprocessor draws and of what all draw through
    the cache; then the parts' sum."""
    count = tile_count(product, tile) * tile.split_k
    itemsize = product.dtype.itemsize
    rows = tile.block_n + product.T / math.ceil(product.T / tile.block_m)
    drawn = rows * product.K * itemsize / tile.split_k
    memory = product.N * product.K * itemsize / device.bandwidth
    busiest = math.ceil(count / device.sms) * drawn / ALONE
    cache = count * drawn / (device.sms * TOGETHER)
    seconds = max(memory, busiest, cache)
    if tile.split_k > 1:
        partial = 2 * 4 * count * tile.block_m * tile.block_n
        seconds += REDUCTION + partial / (device.sms * TOGETHER)
    return seconds
