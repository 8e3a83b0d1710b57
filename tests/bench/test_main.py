"""What ends a benchmark is one line: packages and streams that are not as they should be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import main

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "epyc-zen4-2c" / "offload"


def test_a_package_that_is_not_installed_is_named(tmp_path):
    """In a process of its own: here its modules have been imported."""
    code = (
        "import sys; sys.modules['matplotlib'] = None; from bench.__main__ import main;"
        "raise SystemExit([main([name, *sys.argv[1:]]) for name in ('plot', 'report')] != [2, 2])"
    )
    command = [sys.executable, "-c", code, str(RESULTS), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("pip install matplotlib") == done.stderr.count("\n") == 2


def test_a_terminal_without_the_characters_gets_the_rest():
    """``bench fit`` and others print Greek letters, at the end of what may have taken an hour."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = (
        "from bench import __main__ as bench; from argparse import Namespace;"
        "bench._parse = lambda argv: Namespace(run=lambda args: print(chr(0x3b3), 2));"
        "raise SystemExit(bench.main(['fit']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **plain}, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b"\\u03b3 2\n"), done.stderr


def test_a_reader_that_went_away_is_no_mistake(monkeypatch, capsys):
    def gone(argv):
        raise BrokenPipeError

    monkeypatch.setattr("bench.__main__._parse", gone)
    assert main(["plot"]) == 141
    assert capsys.readouterr().err == ""


def test_help_says_what_is_measured_when_nothing_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        main(["decode", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--gammas GAMMAS (default: 2,4)" in told
    assert "acceptance of the replay drafter (default: 0.947)" in told
