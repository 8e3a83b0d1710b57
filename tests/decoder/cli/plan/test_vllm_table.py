"""``plan --format vllm``: a table as vLLM 0.32 reads it, and nothing else on standard output."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from decoder.__main__ import main
from decoder.cli.plan.vllm_table import speculative_config
from decoder.errors import UserError
from decoder.perf_model.planning.planner import BatchPlan, Cell, Plan

PLAN = ["plan", "--target", "qwen3-30b-a3b", "--machine", "h200", "--format", "vllm"]


def plan_of(best: dict[int, int]) -> Plan:
    """A plan whose best draft length at each batch size is given."""

    def cell(batch: int, gamma: int, speedup: float) -> Cell:
        return Cell(batch, gamma, 1.0, speedup, 100.0, 0.5)

    entries = tuple(
        BatchPlan(batch, 0.01, None, (cell(batch, 0, 1.0), cell(batch, gamma or 2, speedup)))
        for batch, gamma in best.items()
        for speedup in [1.5 if gamma else 1.01]  # a gain of 1 % is noise
    )
    return Plan("target", "draft", "machine", 0.8, 512, entries, (), None, "", ())


def as_vllm_reads_it(table: list[list[int]], max_batch: int, limit: int) -> list[int]:
    """What ``build_dynamic_sd_schedule_lookup`` makes of a table, from batch size 1 on."""
    lookup = [0] * (max_batch + 1)
    previous = 0
    for first, last, tokens in table:
        assert previous < first <= last and tokens >= 0, "ranges ascend and do not overlap"
        for batch in range(first, max_batch + 1):  # also beyond ``last``, until the next range
            lookup[batch] = min(tokens, limit)
        previous = last
    assert table[0][0] == 1
    return lookup[1:]


@pytest.mark.parametrize(
    ("best", "table"),
    [
        ({1: 5}, [[1, 1, 5]]),
        ({1: 0, 2: 4, 4: 4, 8: 3, 16: 0}, [[1, 1, 0], [2, 7, 4], [8, 15, 3], [16, 16, 0]]),
        ({8: 2, 32: 1}, [[1, 31, 2], [32, 32, 1]]),
        ({1: 3, 2: 3, 64: 3}, [[1, 64, 3]]),
    ],
)
def test_the_best_length_of_every_batch_size(best: dict, table: list) -> None:
    config = speculative_config(plan_of(best), "none")
    assert config["num_speculative_tokens_per_batch_size"] == table
    limit = config["num_speculative_tokens"]
    assert limit == max(best.values()) > 0
    read = as_vllm_reads_it(table, 100, limit)
    assert {batch: read[batch - 1] for batch in best} == best
    assert read[99] == best[max(best)]


def test_speculation_that_never_pays_is_no_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="got none of 1, 2: vLLM is to run without"):
        speculative_config(plan_of({1: 0, 2: 0}), None)
    assert main([*PLAN, "--alpha", "0.01", "--batch-sizes", "1,8"]) == 2
    out, err = capsys.readouterr()
    assert not out and "2 % or more" in err and len(err.splitlines()) == 1


def test_standard_output_is_one_json_value(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*PLAN, "--batch-sizes", "1..256"]) == 0
    out, err = capsys.readouterr()
    config = json.loads(out)
    assert config.keys() == {"num_speculative_tokens", "num_speculative_tokens_per_batch_size"}
    assert out.count("\n") == 1 and '"model"' in err
    as_vllm_reads_it(config["num_speculative_tokens_per_batch_size"], 512, 8)


@pytest.mark.parametrize(
    ("draft", "says"),
    [
        ("none", {"method": "ngram"}),
        ("Qwen/Qwen3-0.6B", {"model": "Qwen/Qwen3-0.6B"}),
        ("FOLDER", {"model": "FOLDER"}),
        ("eagle", {}),
        ("qwen3-0.6b", {}),
        (None, {}),
    ],
)
def test_what_drafts_is_said_where_vllm_could_load_it(
    draft: str | None, says: dict, tmp_path: Path
) -> None:
    if draft == "FOLDER":
        draft, says = str(tmp_path), {"model": str(tmp_path)}
    plan = replace(plan_of({1: 2}), target="any")
    config = speculative_config(plan, draft)
    assert {key: config[key] for key in config if not key.startswith("num_")} == says
