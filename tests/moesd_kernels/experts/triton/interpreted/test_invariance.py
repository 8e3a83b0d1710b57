"""``batch_invariant``: a row is the same, bit for bit, whatever other rows are in the batch.

The interpreter multiplies tiles with BLAS, whose rounding depends on a row's place in the tile; a
matrix instruction's does not. So tiles are multiplied here column by column, which tests what is
ours: the tiles, their order and the sums between them. test_gpu.py tests the instructions.
"""

import numpy as np
import pytest
import torch
from support.formats import quantised_case
from support.oracle import check_experts, check_rows, layer_case

from moesd_kernels.experts.triton import fused_experts_triton

# Tall enough for a full block and one row more.
T = 67


@pytest.fixture(scope="module", autouse=True)
def matrix_instruction():
    """Products that round a row the same way wherever it lies in its tile."""

    def matmul(a, b, dtype):
        total = np.zeros((a.shape[0], b.shape[1]), dtype)
        for k in range(a.shape[1]):
            total += a[:, k : k + 1].astype(dtype) * b[k].astype(dtype)
        return total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "matmul", matmul)
        yield


@pytest.fixture(scope="module")
def full(matrix_instruction):
    case = layer_case(5, 2, 48, 32, T)
    return case, case.run(fused_experts_triton, batch_invariant=True)


def test_is_correct(full):
    check_rows(*full)


@pytest.mark.parametrize("rows", [1, 2, 16, 33, 66])
def test_prefix(full, rows):
    case, whole = full
    part = case.rows(slice(rows)).run(fused_experts_triton, batch_invariant=True)
    assert torch.equal(part, whole[:rows])


def test_permutation(full):
    case, whole = full
    order = torch.randperm(T, generator=torch.Generator().manual_seed(3))
    got = case.rows(order).run(fused_experts_triton, batch_invariant=True)
    assert torch.equal(got, whole[order])


@pytest.mark.parametrize("name", ["fp8_block", "mxfp4"])
def test_prefix_with_quantised_weights(name):
    case, plain = quantised_case(name, T, 1, 2, 32, 32)
    whole = case.run(fused_experts_triton, batch_invariant=True)
    check_experts(whole, plain)
    for rows in (1, 33):
        part = case.rows(slice(rows)).run(fused_experts_triton, batch_invariant=True)
        assert torch.equal(part, whole[:rows])
