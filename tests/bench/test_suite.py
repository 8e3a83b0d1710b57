"""The suite: nothing stops it, nothing found is lost, nothing is done twice; and its dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.__main__ import main
from bench.suite.progress import FILE, Lines, drop_half_a_line
from bench.suite.runbook import run_book
from bench.suite.session import Session
from bench.suite.sizes import DRY, FULL, fitting_preset
from bench.suite.supervisor import supervise
from bench.suite.testing import Outcomes

ROOT = Path(__file__).resolve().parents[2]
# A worker with pieces of its own: they write a line each time they run.
WORKER = """
import os, sys, time, pathlib, torch
from bench.suite.progress import Lines
from bench.suite.session import OutOfTimeError, Piece, Session
from bench.suite.sizes import DRY
from bench.suite.worker import work

folder, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
session = Session(torch.device("cpu"), DRY, Lines(folder), folder, grace_s=2.0)

def ran(name, then=lambda: None):
    def run(session):
        session.lines.write("ran", name=name)
        then()
    return run

def fail():
    raise ValueError("told so")

def point_by_point():
    while len(session.lines.find("ran", name="long")) < 3:
        if len(session.lines.find("ran", name="long")) % 2:
            raise OutOfTimeError
        session.lines.write("ran", name="long")

def loses_the_device(session):
    for point in "abcd":
        if session.begin(point) and not session.lines.find("ran", name=point):
            if point in "bd":
                Session.usable = lambda session: False
                raise RuntimeError("illegal access")
            session.lines.write("ran", name=point)

pieces = [
    Piece("loses", 9, loses_the_device),
    Piece("good", 9, ran("good")),
    Piece("bad", 9, ran("bad", fail)),
    Piece("refused", 9, ran("refused"), lambda session: "no such tool"),
    Piece("dies", 9, ran("dies", lambda: os._exit(3))),
    Piece("hangs", 0.1, ran("hangs", lambda: time.sleep(600))),
    Piece("long", 9, ran("long", point_by_point)),
    Piece("last", 9, ran("last")),
]
import bench.suite.worker
bench.suite.worker.LEAST_S = 0.0
work(session, pieces, seconds)
"""


def suite_of_fakes(folder: Path) -> dict[str, str]:
    command = lambda seconds: [sys.executable, "-c", WORKER, str(folder), str(seconds)]
    return supervise(command, folder, minutes=2.0, dry_run=True)


@pytest.fixture(scope="module")
def fakes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fakes")
    return folder, suite_of_fakes(folder)


def test_no_piece_stops_the_next(fakes):
    folder, trouble = fakes
    states = {name: line["state"] for name, line in Lines(folder).states().items()}
    assert states == {
        "loses": "failed",
        "good": "done",
        "bad": "failed",
        "refused": "not run",
        "dies": "failed",
        "hangs": "failed",
        "long": "done",
        "last": "done",
    }
    assert trouble.keys() == {"bad", "dies", "hangs", "loses"}
    assert trouble["bad"] == "ValueError: told so"
    assert "code 3" in trouble["dies"] and trouble["hangs"].startswith("hung")
    assert "told so" in (folder / "suite.log").read_text()


def test_within_a_start_nothing_runs_twice_but_what_was_cut(fakes):
    folder, _ = fakes
    ran = [line["name"] for line in Lines(folder).find("ran")]
    assert ran.count("long") == 3  # begun twice, and its one point
    assert sorted(name for name in ran if name != "long") == [
        "a",
        "bad",
        "c",
        "dies",
        "good",
        "hangs",
        "last",
    ]


def test_a_point_at_which_the_device_is_lost_costs_no_other(fakes):
    folder, trouble = fakes
    lines = [line for line in Lines(folder).find("piece", name="loses") if line["state"] != "begun"]
    assert [line.get("lost_at") for line in lines[:3]] == ["b", "d", None]
    assert trouble["loses"] == "lost the device at b, d"


def test_tests_end_where_the_device_is_lost_and_go_on_behind_it(tmp_path):
    lines = Lines(tmp_path)
    lines.write("start")
    lines.write("test", test="t::passed", outcome="passed")
    lines.write("piece", name="tests", state="lost", lost_at="t::lost")
    session = Session(torch.device("cpu"), DRY, lines, tmp_path)
    names = ("t::passed", "t::lost", "t::other")
    items = [SimpleNamespace(nodeid=x, get_closest_marker=lambda name: None) for x in names]
    outcomes = Outcomes(session)
    outcomes.pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == ["t::other"]
    outcomes.pytest_runtest_setup(items[0])
    outcomes.failed, session.usable = ["t::other"], lambda: False
    with pytest.raises(pytest.exit.Exception, match="lost"):
        outcomes.pytest_runtest_setup(SimpleNamespace(nodeid="t::next"))
    assert session.point == "t::other"


def test_a_second_start_tries_what_failed_again_and_nothing_else(fakes):
    folder, _ = fakes
    before = len(Lines(folder).find("ran"))
    suite_of_fakes(folder)
    again = [line["name"] for line in Lines(folder).find("ran")][before:]
    assert again == ["bad", "dies", "hangs"]


def test_half_a_line_is_cut_off_and_whole_ones_are_kept(tmp_path):
    Lines(tmp_path).write("kernel", T=4)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"kind": "ker')
    assert [line["T"] for line in Lines(tmp_path).find("kernel")] == [4]
    drop_half_a_line(tmp_path)
    Lines(tmp_path).write("kernel", T=5)
    assert [json.loads(text)["T"] for text in (tmp_path / FILE).read_text().splitlines()] == [4, 5]


def test_a_worker_that_cannot_start_is_trouble_at_once(tmp_path):
    command = lambda seconds: [sys.executable, "-c", "raise SystemExit('no torch')"]
    begin = time.monotonic()
    assert "code 1" in supervise(command, tmp_path, minutes=1.0)["worker"]
    assert time.monotonic() - begin < 30


def test_time_ends_the_suite_and_keeps_what_was_found(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.suite.supervisor.CLOSING_S", 0.0)
    # It imports nothing that takes long to load: its line is there well before the end.
    script = (
        "import sys, time; open(sys.argv[1], 'a').write('{\"kind\": \"ran\"}\\n'); time.sleep(600)"
    )
    command = lambda seconds: [sys.executable, "-c", script, str(tmp_path / FILE)]
    assert supervise(command, tmp_path, minutes=0.05) == {}
    assert len(Lines(tmp_path).find("ran")) == 1


def test_pieces_have_distinct_names_and_the_named_tests_exist():
    from bench.suite.testing import CUDA, DECODER, DENSE, FIRST, KERNELS, MEMORY

    for sizes in (FULL, DRY):
        names = [piece.name for piece in run_book(sizes)]
        assert len(set(names)) == len(names)
    for selection in (CUDA, DECODER, DENSE, FIRST, KERNELS, MEMORY):
        assert all((ROOT / file).exists() for file in selection.files)


def test_every_test_has_a_turn_before_any_has_two():
    """Time ends a selection: within a file's first test there may be cases for all of it."""
    from bench.suite.testing import in_turns

    told = [("a::x[1]", 1), ("a::x[2]", 1), ("a::x[3]", 0), ("a::y", 0), ("b::x[1]", 1)]
    items = [
        SimpleNamespace(nodeid=name, get_closest_marker={"first": first or None}.get)
        for name, first in [*told, ("b::z", 1)]
    ]
    ordered = [item.nodeid for item in in_turns(items)]
    assert ordered == ["a::x[1]", "b::x[1]", "b::z", "a::x[2]", "a::y", "a::x[3]"]


def test_the_map_is_large_enough_to_be_held_out():
    cells = {(batch, gamma) for batch, gammas in FULL.cells for gamma in gammas}
    assert len(cells) == sum(len(gammas) for _, gammas in FULL.cells) >= 2 * FULL.fit_points
    assert {(32, 4), (100, 4)} <= cells
    assert FULL.tuned.keys() <= FULL.shapes.keys()


@pytest.mark.parametrize(
    ("gib", "preset"), [(139, "qwen2-57b-a14b"), (78, "qwen3-30b-a3b"), (24, "olmoe")]
)
def test_the_target_is_what_fits(gib, preset):
    assert fitting_preset(gib * 2**30) == preset


def test_too_little_memory_says_how_much_is_needed():
    with pytest.raises(ValueError, match=r"needs 20 GiB of device memory, got 8 GiB free"):
        fitting_preset(8 * 2**30)


def test_a_dry_run_does_all_of_it_and_a_second_start_nothing_again(tmp_path, capsys):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bench", "suite", "--dry-run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start() -> float:
        begin = time.monotonic()
        done = subprocess.run(
            [*command, "--out", str(out)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + (out / "suite.log").read_text()[-4000:]
        assert "dry run: no figure means anything" in done.stdout
        return time.monotonic() - begin

    assert start() < 180
    lines = Lines(out)
    states = {name: line["state"] for name, line in lines.states().items()}
    assert states.keys() == {piece.name for piece in run_book(DRY)}
    needs_gpu = {name for name, line in lines.states().items() if line["state"] == "not run"}
    assert all(state == "done" for name, state in states.items() if name not in needs_gpu)
    if not torch.cuda.is_available():
        assert needs_gpu == {"cuda-tests", "cuda-dry", "memcheck"}
    assert len(list(out.iterdir())) <= 8
    assert "use backend" in (out / "suite.log").read_text(), "what ran is told"
    measured = [line for line in lines.seen if line["kind"] in ("kernel", "decode", "tune", "fit")]
    cells = sum(len(gammas) for _, gammas in DRY.cells)
    assert len(lines.find("decode")) == cells
    start()
    again = Lines(out)
    assert [x for x in again.seen if x["kind"] in ("kernel", "decode", "tune", "fit")] == measured
    assert main(["suite", "--out", str(out)]) == 2
    assert "must be empty or hold a GPU's lines, got a dry run's" in capsys.readouterr().err


def test_bad_arguments_are_one_clear_line(capsys):
    with pytest.raises(SystemExit):
        main(["suite"])
    assert "--out" in capsys.readouterr().err
