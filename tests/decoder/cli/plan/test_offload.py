"""``plan --offload-budget``: what it prints, and what it refuses."""

from __future__ import annotations

import json

import pytest

from decoder.__main__ import main

PLAN = ["plan", "--machine", "h200", "--batch-sizes", "1,16", "--gammas", "1..4"]
MODEL = ["--target", "qwen3-30b-a3b"]
READS = ["--offload-budget", "20", "--offload-bandwidth", "3"]


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict:
    assert main([*PLAN, *MODEL, *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_both(capsys):
    whole, plan = planned(capsys), planned(capsys, *READS)
    assert "(prediction)" in plan["machine"] and plan["basis"].startswith("a prediction: experts")
    for before, entry in zip(whole["batches"], plan["batches"], strict=True):
        assert before["in_memory"] is None
        assert entry["in_memory"] == before
        reads = [cell["read_bytes"] for cell in entry["cells"]]
        assert reads == sorted(reads) and reads[0] > 0
        assert entry["ar_seconds"] > before["ar_seconds"] + 0.9 * reads[0] / 3e9
        assert entry["best_gamma"] in range(5)
    assert all(cell["read_bytes"] is None for cell in whole["batches"][0]["cells"])
    more = planned(capsys, "--offload-budget", "40", "--offload-bandwidth", "3")
    assert more["batches"][0]["ar_seconds"] < plan["batches"][0]["ar_seconds"]
    faster = planned(capsys, "--offload-budget", "20", "--offload-bandwidth", "30")
    assert faster["batches"][0]["ar_seconds"] < plan["batches"][0]["ar_seconds"]


def test_text_has_a_table_and_says_where_experts_wait(capsys):
    for flags, how in ([], "are read while"), (["--offload-experts", "cpu"], "copied ahead"):
        assert main([*PLAN, *MODEL, *READS, *flags]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "Experts brought as needed / all in memory (prediction)" in out
        assert "memory for 2119 of 6144 experts of 9.44 MB" in out
        assert how in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([*MODEL, "--offload-budget", "20"], "need each other, got 20.0 and None"),
        ([*MODEL, "--offload-bandwidth", "3"], "need each other, got None and 3.0"),
        ([*MODEL, "--offload-experts"], "need each other, got None and None"),
        ([*MODEL, *READS, "--offload-experts", "disk"], "invalid choice: 'disk'"),
        ([*MODEL, *READS, "--offload-budget", "-1"], "expected a number in [0"),
        ([*MODEL, *READS, "--offload-budget", "0"], "must be at least 1.21 GB, one layer's 128"),
        ([*MODEL, *READS, "--offload-budget", "60"], "must be below their 58 GB"),
        ([*MODEL, *READS, "--offload-bandwidth", "0"], "expected a number in [0.001"),
        ([*MODEL, *READS, "--ranks", "2"], "by one process, got ranks as well"),
        ([*MODEL, *READS, "--format", "vllm"], "which --format vllm is not for"),
        (["--target", "opt-30b", *READS], "needs a model with experts, got opt-30b"),
    ],
)
def test_what_does_not_work_is_one_line(capsys, flags, said):
    try:
        assert main([*PLAN, *flags]) == 2
    except SystemExit as end:
        assert end.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
