"""The router's choices are the C++ operator's, and its weights as accurate as eager PyTorch's."""

import pytest
import torch
from support.oracle import assert_as_accurate

from moesd_kernels.dense import ops
from moesd_kernels.dense.triton.router_kernel import softmax_topk_router, topk_of_logits

# Fewer experts than a warp has threads; a prime number; one; all of them chosen; the limits.
SHAPES = [(8, 2), (61, 8), (1, 1), (7, 7), (128, 8), (1024, 32)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def operator(logits, top_k, renormalize):
    """Weights and ids of the C++ operator; its logits are those given, times one and plus zeros."""
    identity = torch.eye(logits.shape[1], dtype=logits.dtype)
    made, weights, ids = ops.softmax_topk_router(logits, identity, top_k, renormalize)
    assert torch.equal(made, logits)
    return weights, ids


def eager(logits, top_k, renormalize):
    weights = logits.softmax(-1).topk(top_k).values
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights


@DTYPES
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("E, K", SHAPES)
def test_chooses_as_the_operator(E, K, renormalize, dtype):
    logits = torch.randn(3, E).to(dtype) * 2
    weights, ids = topk_of_logits(logits, K, renormalize)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int64
    assert torch.equal(ids, operator(logits, K, renormalize)[1])
    baseline = eager(logits.float(), K, renormalize)
    exact = eager(logits.double(), K, renormalize)
    assert_as_accurate(weights, baseline, exact, groups=torch.arange(3), name="weights")


@DTYPES
def test_the_lower_of_equals_comes_first(dtype):
    logits = torch.tensor([[1.0, 2, 1, 2, 1, 0, 2, -9]]).to(dtype)
    assert topk_of_logits(logits, 6, True)[1].tolist() == [[1, 3, 6, 0, 2, 4]]
    # So far below the largest all are equal, as in the operator: a ban, too.
    logits = torch.tensor([[-float("inf"), -95, 0, -90, 1]]).to(dtype)
    expected = operator(logits.nan_to_num(neginf=-300), 5, False)[1]
    assert topk_of_logits(logits, 5, False)[1].tolist() == expected.tolist() == [[4, 2, 0, 1, 3]]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("renormalize", [False, True])
def test_tokens_without_a_softmax(renormalize):
    nan, inf = float("nan"), float("inf")
    rows = [[0.0, nan, 1], [inf, 0, 1], [-inf] * 3, [nan] * 3, [inf, nan, 0], [0, -inf, 1]]
    logits = torch.tensor(rows)
    weights, ids = topk_of_logits(logits, 2, renormalize)
    assert weights[:5].isnan().all() and ids[:5].tolist() == [[0, 1]] * 5
    assert ids[5].tolist() == [2, 0]
    torch.testing.assert_close(weights[5], eager(logits[5:].double(), 2, renormalize)[0].float())


def test_router_is_a_product_and_a_choice():
    x, w = torch.randn(4, 16).half(), torch.randn(9, 16).half()
    logits, weights, ids = softmax_topk_router(x, w, 3, True)
    assert torch.equal(logits, torch.nn.functional.linear(x, w))
    chosen = topk_of_logits(logits, 3, True)
    assert torch.equal(weights, chosen[0]) and torch.equal(ids, chosen[1])


def test_a_row_depends_on_itself_alone_wherever_it_lies():
    logits = torch.randn(5, 2, 40)[:, 1]
    whole = topk_of_logits(logits, 4, True)
    for t in range(5):
        alone = topk_of_logits(logits[t : t + 1].clone(), 4, True)
        assert all(torch.equal(a[0], b[t]) for a, b in zip(alone, whole, strict=True))


def test_empty_and_errors():
    logits = torch.zeros(2, 6)
    assert topk_of_logits(logits[:0], 2, True)[1].shape == (0, 2)
    for top_k, message in ((0, r"in \[1, 6\], got 0"), (7, r"in \[1, 6\], got 7")):
        with pytest.raises(ValueError, match=message):
            topk_of_logits(logits, top_k, True)
    with pytest.raises(ValueError, match=r"in \[1, 32\], got 33"):
        topk_of_logits(torch.zeros(1, 64), 33, True)
    with pytest.raises(ValueError, match="at most 1024 experts, got 1025"):
        topk_of_logits(torch.zeros(1, 1025), 1, True)
    with pytest.raises(TypeError, match="logits must be float32"):
        topk_of_logits(logits.double(), 1, True)
    with pytest.raises(TypeError, match=r"w must be torch.float32, got torch.float16"):
        softmax_topk_router(logits, logits.half(), 1, True)
