"""The suite's bars, judged on lines whose figures are known."""

from __future__ import annotations

from typing import Any

import pytest

from bench.suite.progress import Lines
from bench.suite.summary import BARS, SOURCE_PEERS, summary_table

SHAPE = [64, 8, 3584, 2560]
COPY = 4e12  # bytes/s
PEER, TUNED = SOURCE_PEERS
AGAINST_VLLM = "vLLM's Triton kernel / ours, T <= 320"


@pytest.fixture
def lines(tmp_path) -> Lines:
    lines = Lines(tmp_path)
    lines.write("start", minutes=8, dry_run=False)
    lines.write("roofline", ceilings={"read": COPY, "copy": COPY, "peak": {}})
    return lines


def layer(lines: Lines, B: int, over: float, gamma: int = 0, **fields: Any) -> None:
    """A point that takes ``over`` times its bytes at the measured rate, which is its floor."""
    floor = 1e-4 * (gamma + 1)
    ratio = fields.pop("ratio", {"grouped_mm": 2.0, "batch_invariant": 1.01})
    values = {"backend": "auto", "not_captured": {}, "tuned": False, "floor_s": floor}
    values |= {"bytes": floor * COPY, "seconds": {"moesd": {"median": over * floor}}}
    T = B * (gamma + 1)
    lines.write("kernel", shape=SHAPE, B=B, gamma=gamma, T=T, ratio=ratio, **values | fields)


def judged(lines: Lines) -> dict[str, tuple[str, bool | None] | None]:
    return {what: find(lines) for what, _, find in BARS}


def test_nothing_measured_claims_nothing(lines):
    assert set(judged(lines).values()) == {None}
    assert "not measured" in str(list(summary_table(lines).columns[2].cells))


def test_the_worst_point_of_a_range_is_held_against_its_bar(lines):
    layer(lines, 1, 1.15)
    layer(lines, 8, 1.25)
    layer(lines, 16, 1.05)
    layer(lines, 320, 1.09)
    found = judged(lines)
    assert found["layer time / (bytes / measured rate), T >= 16"] == (
        "worst 1.09x, 64,8,3584,2560 T = 320",
        True,
    )
    assert found["layer time / (bytes / measured rate), T <= 8"] == (
        "worst 1.25x, 64,8,3584,2560 T = 8",
        False,
    )


def test_the_faster_of_two_measurements_of_a_point_counts_and_other_backends_do_not(lines):
    layer(lines, 32, 1.30)
    layer(lines, 32, 1.06, tuned=True)
    layer(lines, 32, 0.90, backend="cuda")
    assert judged(lines)["layer time / (bytes / measured rate), T >= 16"][0].startswith(
        "worst 1.06x"
    )


def test_peers_are_judged_at_their_slowest_advantage_and_eager_timing_is_said(lines):
    layer(lines, 4, 1.1, ratio={"grouped_mm": 3.0, TUNED: 1.9, PEER: 1.4})
    layer(
        lines,
        64,
        1.1,
        ratio={"grouped_mm": 1.4, PEER: 1.3, TUNED: 0.97},
        not_captured={"grouped_mm": "waits"},
    )
    layer(lines, 320, 1.1, ratio={"grouped_mm": 1.0, PEER: 1.2})
    found = judged(lines)
    grouped, met = found["grouped_mm / ours, T <= 64"]
    assert grouped.startswith("lowest 1.40x") and grouped.endswith("timed eagerly") and not met
    assert found[AGAINST_VLLM] == ("lowest 0.97x, 64,8,3584,2560 T = 64", False)


def test_the_layers_efficiency_is_a_share_of_the_rooflines_own(lines):
    layer(lines, 32, 1.0)
    assert judged(lines)["layer's target efficiency / roofline's, B = 32, γ = 4"] is None
    layer(lines, 32, 1.04, gamma=4)
    text, met = judged(lines)["layer's target efficiency / roofline's, B = 32, γ = 4"]
    assert (text, met) == (f"lowest {1 / 1.04:.3f}", True)


def test_tests_that_were_skipped_are_not_counted_as_passed(lines):
    lines.write("test", test="a", outcome="failed")
    lines.write("test", test="a", outcome="passed")
    assert judged(lines)["correctness, invariance, changed routing in a graph"][1] is True
    lines.write("test", test="b", outcome="skipped")
    text, met = judged(lines)["correctness, invariance, changed routing in a graph"]
    assert text == "1 passed, 0 failed, 1 skipped" and met is False


def test_the_best_batch_and_the_fit(lines):
    for batch, speedup in ((8, 1.7), (32, 2.31), (100, 1.9)):
        lines.write(
            "decode", target="qwen", batch=batch, gamma=4, speedup=speedup, sigma=0.9, forced=True
        )
    lines.write("decode", target="qwen", batch=1, gamma=2, speedup=9.9, sigma=0.9, forced=True)
    found = judged(lines)
    assert found["speculative / plain, sigma 0.90, γ = 4, best B"] == (
        "2.31x, qwen, B = 32, sigma 0.90",
        True,
    )
    assert found["B x γ map, model fitted on 21 cells: held-out median error"] == (
        "4 cells, not fitted",
        False,
    )
    lines.write("fit", model="improved", error={"median": 0.031})
    text, met = judged(lines)["B x γ map, model fitted on 21 cells: held-out median error"]
    assert "3.1 %" in text and met
