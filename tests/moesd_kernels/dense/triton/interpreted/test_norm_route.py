"""The joined launch gives what add and norm give, and the router's choices of that."""

import pytest
import torch
from support.oracle import assert_as_accurate

from moesd_kernels.dense.triton.norm_kernel import add_rms_norm
from moesd_kernels.dense.triton.norm_route_kernel import add_norm_route

EPS = 1e-6


def inputs(T, H, E, dtype):
    generator = torch.Generator().manual_seed(H)
    random = lambda *sizes: torch.randn(*sizes, generator=generator).to(dtype)
    return random(T, H), random(T, H), 1 + random(H) / 8, random(E, H) / H**0.5


def routed(normed, router, K, renormalize):
    """Weights and ids by ``torch``, in the dtype of what is given."""
    logits = (normed @ router.T).to(torch.promote_types(normed.dtype, torch.float32))
    weights, ids = logits.softmax(-1).topk(K)
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights, ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("H", "E", "K"), [(64, 8, 2), (100, 61, 8), (2050, 128, 8)])
def test_equals_its_steps(H, E, K, renormalize, dtype):
    x, delta, w, router = inputs(3, H, E, dtype)
    total, normed, weights, ids = add_norm_route(x, delta, w, EPS, router, K, renormalize)
    expected = add_rms_norm(x, delta, w, EPS)
    assert torch.equal(total, expected[0]) and torch.equal(normed, expected[1])
    baseline, _ = routed(normed, router, K, renormalize)
    exact, chosen = routed(normed.double(), router.double(), K, renormalize)
    assert torch.equal(ids, chosen)
    rows = torch.arange(3)
    assert_as_accurate(weights, baseline, exact, groups=rows, name="weights")


def test_rows_do_not_depend_on_each_other():
    x, delta, w, router = inputs(5, 96, 16, torch.float16)
    whole = add_norm_route(x, delta, w, EPS, router, 4, True, torch.float16)
    assert whole[2].dtype == torch.float16
    for row in range(5):
        one = slice(row, row + 1)
        alone = add_norm_route(x[one], delta[one], w, EPS, router, 4, True, torch.float16)
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize(
    ("E", "K", "message"),
    [(2000, 8, "at most 1024 experts, got 2000"), (8, 9, r"top_k must be in \[1, 8\], got 9")],
)
def test_refuses(E, K, message):
    with pytest.raises(ValueError, match=message):
        add_norm_route(*inputs(1, 32, E, torch.float32)[:3], EPS, torch.ones(E, 32), K, True)
