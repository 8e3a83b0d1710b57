"""Choice of a product's tiles: what may follow T, and what may not."""

import pytest
import torch

from moesd_kernels.dense.triton.linear_config import (
    MAX_PARTS,
    MAX_SPLIT_TILES,
    STEP,
    Product,
    linear_tiles,
    part_columns,
    part_count,
    tile_count,
)
from moesd_kernels.experts.triton.types import A100, B200, H100, H200, Device

DEVICES = [A100, H100, H200, B200, Device("GeForce", 89, 128, 101376, 9e11, 1.6e14)]
TOKENS = [*range(1, 70), 100, 128, 160, 200, 512, 4096]


@pytest.mark.parametrize("K", [0, 1, 7, 128, 129, 512, 513, 896, 2048, 4096, 4864, 14336, 53248])
def test_parts_cover_a_row(K):
    columns, parts = part_columns(K), part_count(K)
    assert columns % STEP == 0
    assert 1 <= parts <= MAX_PARTS
    assert (parts - 1) * columns < max(1, K) <= parts * columns


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_the_order_of_sums_follows_neither_tokens_nor_width(device, dtype):
    """One instruction, steps of one length, and all parts or one to a program."""
    for K in (896, 4096):
        tiles = [
            linear_tiles(Product(T, N, K, dtype), device)
            for T in TOKENS
            for N in (16, 896, 5120, 151936)
        ]
        assert len({(tile.swap_ab, tile.block_k) for tile in tiles}) == 1
        assert {tile.split_k for tile in tiles} <= {1, part_count(K)}
        if device.capability >= 90 and not tiles[0].swap_ab:
            # Tiles of 64 rows would go to another instruction than lower ones.
            assert {tile.block_m for tile in tiles} == {16, 32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_tiles_fit(device, dtype):
    for T in TOKENS:
        for N, K in ((896, 4864), (5120, 2048), (151936, 896)):
            product = Product(T, N, K, dtype)
            tile = linear_tiles(product, device)
            stage = (tile.block_m + tile.block_n) * tile.block_k * dtype.itemsize
            assert tile.num_stages * stage < device.shared_bytes
            assert tile.split_k == 1 or tile_count(product, tile) <= MAX_SPLIT_TILES


@pytest.mark.parametrize(
    ("N", "K", "T", "parts"),
    [
        (5120, 2048, 5, 1),  # Qwen3-30B's q, k, v
        (2048, 4096, 5, 8),  # and o
        (1152, 896, 5, 1),  # Qwen2-0.5B's q, k, v: a part would be no longer than its sum
        (9728, 896, 5, 1),
        (896, 4864, 5, 8),
        (151936, 896, 160, 1),
        (896, 4864, 160, 8),
        (896, 4864, 4096, 1),  # a prompt fills a device by itself
    ],
)
def test_what_is_split(N, K, T, parts):
    assert linear_tiles(Product(T, N, K, torch.bfloat16), H200).split_k == parts
