"""Which decode lines are cells of one model, and which no model in memory describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.page.headline import headline
from bench.page.questions import _most_cells
from bench.pictures.decode import draw_map
from bench.runs.cells import group_cells, load_cells, setup_fields
from bench.workloads.models import moe_310m
from decoder.perf_model.config_spec import spec_from_config
from decoder.perf_model.hardware.machine import named_machine

ENV = {"device": "A CPU, 2 threads", "threads": 2, "commit": "a", "command": "python -m bench x"}
OTHER_RUNS = [
    {"offload_budget": 0.25},
    {"ranks": 2, "parallel": "expert"},
    {"ranks": 2, "parallel": "tensor"},
    {"model_dtype": "fp32"},
    {"env": ENV | {"device": "Another CPU, 2 threads"}},
    {"env": ENV | {"threads": 1}},
]


def cell(batch: int = 1, gamma: int = 4, **fields: Any) -> dict[str, Any]:
    spec = spec_from_config(moe_310m())
    setup = setup_fields(spec, None, named_machine("h200"), "bf16")
    seen = {
        "top_k": 4,
        "context": 64,
        "sigma": 0.9,
        "speedup": 1.5,
        "target_efficiency": 0.8,
        "env": ENV,
    }
    return {"kind": "decode", "target": "moe", "batch": batch, "gamma": gamma, **setup, **seen} | (
        fields
    )


def written(folder: Path, lines: list[dict[str, Any]]) -> Path:
    path = folder / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("other", OTHER_RUNS)
def test_another_way_to_run_is_another_group(other, tmp_path):
    lines = [cell(1), cell(1, **other), cell(2), cell(2, **other), cell(4)]
    assert [[x["batch"] for x in group.lines] for group in group_cells(lines)] == [
        [1, 2, 4],
        [1, 2],
    ]
    assert _most_cells(lines) == [lines[0], lines[2], lines[4]], "a picture mixes none, either"
    lines += [x | {"gamma": 2} for x in lines]
    assert len(set(draw_map(lines, tmp_path))) == 2, "and none is drawn over another"


def test_lines_from_before_there_were_ranks_are_of_one():
    (group,) = group_cells([cell(1), cell(2, ranks=1, parallel=None, offload_budget=None)])
    assert len(group.lines) == 2


def test_what_no_model_in_memory_describes_is_left_out_and_said(tmp_path, capsys):
    apart = [cell(offload_budget=0.25), cell(ranks=2, parallel="expert")]
    (group,) = load_cells([written(tmp_path, [cell(), *apart])])
    assert len(group.lines) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "2 of 3 lines left out" in said
    assert "offload 0.25" in said and "2 ranks expert" in said
    with pytest.raises(ValueError, match="no decode lines"):
        load_cells([written(tmp_path, apart)])


def test_the_headline_says_how_its_best_cell_ran():
    (number,) = headline([cell(), cell(speedup=3.0, offload_budget=0.25)])
    assert "offload 0.25" in number.words
    (number,) = headline([cell(speedup=3.0, ranks=2, parallel="expert")])
    assert "2 ranks expert" in number.words
