"""Pieces that run the project's own GPU tests, a line for each."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from bench.measure.record import ROOT
from bench.suite.session import OutOfTimeError, Session

LAYER_TESTS = "tests/moesd_kernels/experts/triton/test_gpu.py"
FORMAT_TESTS = "tests/moesd_kernels/experts/triton/test_formats_gpu.py"
RECURRENT_TESTS = "tests/moesd_kernels/dense/triton/recurrent/test_gpu.py"


@dataclass(frozen=True, slots=True)
class Selection:
    """Tests by file, marker and name, as pytest's ``-m`` and ``-k`` take them."""

    files: tuple[str, ...]
    marked: str = "gpu"
    named: str = ""

    def arguments(self) -> list[str]:
        """pytest's command line."""
        chosen = ["-m", self.marked] + (["-k", self.named] if self.named else [])
        # Libraries of a machine that we did not install may warn; a test must not fail by that.
        return [*(str(ROOT / file) for file in self.files), "-W", "default", *chosen]


FIRST = Selection((LAYER_TESTS,), marked="gpu and first", named="not cuda_backend")
KERNELS = Selection((LAYER_TESTS, FORMAT_TESTS, RECURRENT_TESTS), named="not cuda_backend")
CUDA = Selection((LAYER_TESTS,), named="cuda_backend")
DENSE = Selection(
    tuple(
        f"tests/moesd_kernels/dense/triton/{name}"
        for name in (
            "test_small_gpu.py",
            "test_linear_gpu.py",
            "test_attention_gpu.py",
            "sampling/test_gpu.py",
        )
    )
)
DECODER = Selection(("tests/decoder/test_gpu.py",))
MEMORY = Selection((LAYER_TESTS,), named="skipped or variants")


class Outcomes:
    """pytest plugin: writes each test's outcome, leaves out what passed before, keeps the time."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.failed: list[str] = []
        self.out_of_time = False

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Tests that passed in an earlier start need not run again."""
        lines = self.session.lines
        settled = {x["test"] for x in lines.find("test", outcome="passed")}
        settled.update(lines.lost_in_this_start())
        items[:] = in_turns([item for item in items if item.nodeid not in settled])

    def pytest_runtest_setup(self, item: Any) -> None:
        """Stop between two tests when the piece's time is up, or the device is lost."""
        import pytest

        if self.failed and not self.session.usable():
            pytest.exit("the device is lost", returncode=1)
        self.session.point = item.nodeid
        if self.session.left() < 1.0:
            self.out_of_time = True
            pytest.exit("out of time", returncode=0)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A line for the call of each test, or for what came before it when that failed."""
        if report.when != "call" and report.outcome == "passed":
            return
        error = str(report.longrepr)[-600:] if report.outcome == "failed" else None
        self.session.lines.write(
            "test",
            test=report.nodeid,
            outcome=report.outcome,
            seconds=round(report.duration, 3),
            error=error,
        )
        if report.outcome == "failed":
            self.failed.append(report.nodeid)


def in_turns(items: list[Any]) -> list[Any]:
    """A case of every test before the second of any, so that time ends where least is left to see;
    tests marked ``first`` before the others."""
    cases = Counter[str]()

    def turn(item: Any) -> tuple[bool, int]:
        test = item.nodeid.partition("[")[0]
        cases[test] += 1
        return item.get_closest_marker("first") is None, cases[test]

    return sorted(items, key=turn)


def run_tests(selection: Selection, session: Session) -> None:
    """Run a selection in this process, whose CUDA context and compiled kernels are warm.

    Raises:
        RuntimeError: tests failed, or could not be collected.
        OutOfTimeError: some have not run.
    """
    import pytest

    outcomes = Outcomes(session)
    threads = torch.get_num_threads()
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={ROOT}"]
    code = pytest.main(
        [*options, "-c", str(ROOT / "pyproject.toml"), *selection.arguments()], plugins=[outcomes]
    )
    torch.set_num_threads(threads)  # the tests' own set-up changes it
    session.release()
    if outcomes.failed:
        raise RuntimeError(f"{len(outcomes.failed)} tests failed: {', '.join(outcomes.failed)}")
    if outcomes.out_of_time:
        raise OutOfTimeError
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest ended with {code!r}; the log says why")


def check_memory(session: Session) -> None:
    """Some of the layer tests once more under compute-sanitizer.

    Raises:
        RuntimeError: it found something, or did not end in time.
    """
    memcheck = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    command = [*memcheck, sys.executable, "-m", "pytest", "-q", *MEMORY.arguments()]
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=session.left()).returncode
    except subprocess.TimeoutExpired:
        raise OutOfTimeError from None
    session.lines.write("memcheck", code=code, command_line=" ".join(command[5:]))
    if code:
        raise RuntimeError(f"compute-sanitizer ended with code {code}; the log says why")
