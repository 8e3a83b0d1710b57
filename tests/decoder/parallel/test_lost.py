"""A rank that ends before the others: one message, in time, and nothing lost that is finished."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from support.ranks import processes as ranks
from support.ranks import work as rank_work
from support.tiny import tiny_model

from decoder.__main__ import main

_COUNT = 12  # prompts


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _said(folder: Path, size: int) -> list[str]:
    """Lines of all ranks, without those of the progress bar."""
    every = [ranks.printed(folder, rank).replace("\r", "\n").splitlines() for rank in range(size)]
    return [line for lines in every for line in lines if line.strip() and "seq/s" not in line]


def _outputs(path: Path) -> list[tuple[int, str]]:
    return sorted((line["index"], line["text"]) for line in map(json.loads, _lines(path)))


def test_a_killed_rank_ends_the_run_and_what_was_finished_stays(tmp_path: Path) -> None:
    prompts, output, alone = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "alone.jsonl"))
    lengths = [4 + 9 * (place % 5) for place in range(_COUNT)]
    lines = [{"prompt": f"def f{n}(", "max_new_tokens": m} for n, m in enumerate(lengths)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["generate", "--target", "embedded", "--prompts", str(prompts), "--dtype", "fp32"]
    command += ["--batch-size", "2", "--ignore-eos"]
    parallel = [*command, "--output", str(output), "--parallel", "expert"]
    parallel += ["--parallel-timeout", "20"]

    processes = ranks.start(2, rank_work.run_command, tmp_path, *parallel)
    deadline = time.monotonic() + 120
    while len(_lines(output)) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    victim = processes[1].pid
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    assert ranks.join(processes) == [1, -signal.SIGKILL]
    assert time.monotonic() - began < 20
    finished = len(_outputs(output))
    assert 2 <= finished < _COUNT
    assert _said(tmp_path, 2) == [f"moesd: error: stopped after {finished} results: rank 1 is gone"]

    resumed = ranks.start(2, rank_work.run_command, tmp_path, *parallel, "--resume")
    assert ranks.join(resumed) == [0, 0], _said(tmp_path, 2)
    assert len(_said(tmp_path, 2)) == 1  # the statistics, of rank 0
    assert main([*command, "--output", str(alone)]) == 0
    assert _outputs(output) == _outputs(alone)


def test_a_rank_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model")
    start = ranks.start(2, rank_work.fail_in_forward, tmp_path, str(tmp_path / "model"), tmp_path)
    assert ranks.join(start) == [0, 0], ranks.printed(tmp_path, 0)
    first, second = (ranks.reported(tmp_path, rank) for rank in range(2))
    assert first["lost"] == second["lost"] == "rank 1 failed: no room for 3 GiB"


def test_an_interrupted_forward_is_not_gone_on_from(tmp_path: Path) -> None:
    """The others are in the middle of its sums, and would take those of the next for them."""
    path = tmp_path / "model"
    tiny_model("qwen3_moe").save_pretrained(path)
    began = time.monotonic()
    start = ranks.start(2, rank_work.interrupt_in_forward, tmp_path, str(path), tmp_path)
    assert ranks.join(start) == [0, 0], ranks.printed(tmp_path, 0)
    refusal = "RankLost: the run was interrupted in what all ranks do; start them again"
    assert ranks.reported(tmp_path, 0)["said"] == ["KeyboardInterrupt: ", refusal]
    assert ranks.reported(tmp_path, 1)["said"] == ["rank 0 is gone"]
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("dies", "RankLost: rank 1 is gone"),
        ("raises", "RankLost: rank 1 failed: model path '.*-not' does not exist"),
    ],
)
def test_a_rank_that_does_not_load_is_named(how: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    tiny_model("qwen3_moe").save_pretrained(path)
    start = ranks.start(2, rank_work.fail_to_load, tmp_path, str(path), tmp_path, how)
    assert ranks.join(start) == [0, 0], ranks.printed(tmp_path, 0)
    assert re.match(message, ranks.reported(tmp_path, 0)["lost"])


def test_ranks_that_differ_are_refused(tmp_path: Path) -> None:
    assert ranks.join(ranks.start(2, rank_work.differ, tmp_path, tmp_path)) == [0, 0]
    expected = "ranks must have the same instruction set, got isa0 on rank 0 and isa1 on rank 1"
    assert [ranks.reported(tmp_path, rank)["said"] for rank in range(2)] == [expected] * 2
