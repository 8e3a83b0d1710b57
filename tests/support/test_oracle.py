"""The oracle itself: it must catch what global tolerances let pass."""

from __future__ import annotations

import pytest
import torch
from support.oracle import (
    assert_as_accurate,
    check_experts,
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
