"""The oracle itself: it must catch what global tolerances let pass."""

from __future__ import annotations

import pytest
import torch
from support.oracle import (
    assert_as_accurate,
    check_experts,
    check_rows,
    dominant_expert,
    eager_experts,
    exact_experts,
    make_case,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def case(request):
    return make_case(48, 2, 5, 64, 32, request.param)


def test_accepts_the_baseline(case):
    check_experts(eager_experts(case), case)


def test_accepts_a_better_result(case):
    check_experts(exact_experts(case).to(case.tensors[0].dtype), case)


def test_catches_one_wrong_element(case):
    wrong = eager_experts(case)
    wrong[17, 5] = 0
    with pytest.raises(AssertionError, match="row 17, element 5"):
        check_experts(wrong, case)


def test_catches_one_wrong_tile(case):
    wrong = eager_experts(case)
    wrong[16:32, 16:32] = 0
    with pytest.raises(AssertionError, match="times the bound"):
        check_experts(wrong, case)


def test_catches_nan(case):
    wrong = eager_experts(case)
    wrong[3, 3] = float("nan")
    with pytest.raises(AssertionError, match="row 3, element 3"):
        check_experts(wrong, case)


def test_catches_swapped_experts(case):
    x, w_gate_up, w_down, ids, weights = case.tensors
    swapped = case._replace(tensors=(x, w_gate_up, w_down, ids.flip(1), weights))
    with pytest.raises(AssertionError, match="times the bound"):
        check_experts(eager_experts(swapped), case)


def test_small_experts_do_not_hide_under_large_ones():
    """Expert 0 is 1000 times larger; an error of expert 1's size must still show."""
    case = make_case(32, 1, 2, 32, 16, torch.bfloat16)
    x, w_gate_up, w_down, ids, weights = case.tensors
    w_down = w_down * torch.tensor([1000.0, 1.0], dtype=w_down.dtype)[:, None, None]
    case = case._replace(tensors=(x, w_gate_up, w_down, ids, weights))
    wrong = eager_experts(case)
    row = int((dominant_expert(case) == 1).nonzero()[0])
    wrong[row] *= 1.2
    with pytest.raises(AssertionError, match=f"row {row}"):
        check_experts(wrong, case)
    assert_as_accurate(
        wrong, eager_experts(case), exact_experts(case)
    )  # one bound for all hides it


def test_a_row_has_a_bound_of_its_own():
    """An error that a larger row of the same expert allows is one in a small row."""
    case = make_case(32, 1, 2, 32, 16, torch.bfloat16)
    case.x[5] *= 0.01
    wrong = eager_experts(case)
    check_rows(case, wrong)
    wrong[5] *= 1.2
    check_experts(wrong, case)
    with pytest.raises(AssertionError, match="row 5"):
        check_rows(case, wrong)


def test_the_layer_is_the_formula():
    """gpt-oss's gate, token by token; an id that is no expert's contributes nothing."""
    gate_options = {"interleaved": True, "activation_limit": 0.5, "activation_alpha": 1.7}
    ids = torch.tensor([[1, 0], [0, 3], [-1, 2], [3, -5]])
    case = make_case(4, 2, 3, 6, 5, torch.float64, ids=ids, bias=True, **gate_options)
    x, w_gate_up, w_down, _, weights = case.tensors
    expected = torch.zeros(4, 6, dtype=torch.float64)
    for t, k in ((0, 0), (0, 1), (1, 0), (2, 1)):
        e = ids[t, k]
        projected = w_gate_up[e] @ x[t] + case.options["gate_up_bias"][e]
        gate, up = projected[0::2].clamp(max=0.5), projected[1::2].clamp(-0.5, 0.5)
        active = (up + 1) * gate * torch.sigmoid(1.7 * gate)
        expected[t] += weights[t, k] * (w_down[e] @ active + case.options["down_bias"][e])
    torch.testing.assert_close(exact_experts(case), expected)
