"""Layouts, gates and tilings other than the default, interpreted."""

from dataclasses import replace

import pytest
import torch
from support.oracle import check_rows, layer_case

from moesd_kernels.experts.triton import fused_experts_triton
from moesd_kernels.experts.triton.types import LayerTiles, TileConfig

SMALL = TileConfig(block_m=16, block_n=32, block_k=32)
CONFIG = LayerTiles(gate_up=SMALL, down=SMALL, single_gate_up=SMALL, single_down=SMALL)

VARIANTS = {
    "transposed": {"transposed": True},
    "interleaved": {"interleaved": True},
    "bias": {"bias": True},
    "gpt-oss": {
        "transposed": True,
        "interleaved": True,
        "bias": True,
        "activation_limit": 0.7,
        "activation_alpha": 1.702,
    },
    "clamped silu": {"activation_limit": 0.5},
    "no gate, relu2": {"gated": False, "activation": "relu2", "bias": True},
    "no gate, transposed": {"gated": False, "activation": "relu", "transposed": True},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "gelu": {"activation": "gelu"},
}


@pytest.mark.parametrize(
    ("T", "dtype"),
    [(1, torch.float32), (1, torch.float16), (5, torch.float32), (5, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name, T, dtype):
    case = layer_case(3, 2, 40, 24, T, dtype, **VARIANTS[name])
    check_rows(case, case.run(fused_experts_triton, config=CONFIG))


TILINGS = {
    "swap_ab": TileConfig(block_m=16, block_n=64, block_k=16, swap_ab=True),
    "split_k": TileConfig(block_m=16, block_n=32, block_k=16, split_k=3),
    "more splits than steps": TileConfig(block_m=16, block_n=32, block_k=32, split_k=4),
    "tile wider than I": TileConfig(block_m=32, block_n=128, block_k=64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", TILINGS)
def test_tiling(name, dtype):
    tiling = TILINGS[name]
    case = layer_case(3, 2, 48, 80, 7, dtype, bias=True)
    config = LayerTiles(replace(tiling, split_k=1), tiling, SMALL, SMALL)
    check_rows(case, case.run(fused_experts_triton, config=config))
