"""Real runs that are killed, fill a disk or lose their reader: every finished result is on disk,
and resuming completes them without loss or duplicate."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from decoder.__main__ import main

ROOT = Path(__file__).resolve().parents[3]
COUNT = 24
FLAGS = ["--target", "embedded", "--threads", "1", "--batch-size", "4", "--max-new-tokens", "48",
         "--drafter", "ngram", "--gamma", "2", "--ignore-eos"]  # fmt: skip

# How a shell starts a run, and the exit code it has then: of the first three, after the signal
# that they are called by and are sent when they have some results.
RUNS = {
    "INT": ("exec {command} --output {output}", 130),
    "TERM": ("exec {command} --output {output}", 143),
    "KILL": ("exec {command} --output {output} >&- 2>&-", -9),
    "full": ("ulimit -f 8; exec {command} --output {output}", 1),
    "pipe": ("{command} --json | head -1; exit ${{PIPESTATUS[0]}}", 141),
}
SIGNALS = ("INT", "TERM", "KILL")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    lines = [{"prompt": f"def f{i}(n):\n", "id": i % 3} for i in range(COUNT)]
    (path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def arguments(folder, name):
    out = str(folder / f"{name}.jsonl")
    return ["generate", "--prompts", str(folder / "p.jsonl"), *FLAGS, "--output", out]


def records(path, whole=True):
    lines = path.read_bytes().split(b"\n")
    assert not whole or lines[-1] == b""
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture(scope="module")
def expected(folder):
    assert main(arguments(folder, "expected")) == 0
    return {r["index"]: r["token_ids"] for r in records(folder / "expected.jsonl")}


def start(folder, name):
    flags = " ".join([f"--prompts {folder}/p.jsonl", *FLAGS])
    command = f"'{sys.executable}' -m decoder generate {flags}"
    script = RUNS[name][0].format(command=command, output=folder / f"{name}.jsonl")
    return subprocess.Popen(
        ["bash", "-c", script], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def ended(folder):
    """All runs, side by side: exit code, standard output and standard error of each."""
    runs = {name: start(folder, name) for name in RUNS}
    deadline = time.monotonic() + 120
    waiting = set(SIGNALS)
    while waiting and time.monotonic() < deadline:
        for name in sorted(waiting):
            out = folder / f"{name}.jsonl"
            if out.exists() and out.read_bytes().count(b"\n") >= 3:
                runs[name].send_signal(signal.Signals[f"SIG{name}"])
                waiting.discard(name)
        time.sleep(0.005)
    said = {name: run.communicate(timeout=120) for name, run in runs.items()}
    assert not waiting
    return {name: (runs[name].returncode, *said[name]) for name in runs}


@pytest.mark.parametrize("name", [*SIGNALS, "full"])
def test_what_finished_is_on_disk_and_resume_completes_it(folder, expected, ended, name):
    out = folder / f"{name}.jsonl"
    kept = {r["index"]: r["token_ids"] for r in records(out, whole=name in ("INT", "TERM"))}
    assert 3 <= len(kept) < COUNT
    assert kept.items() <= expected.items()
    assert main([*arguments(folder, name), "--resume"]) == 0
    found = records(out)
    assert len(found) == COUNT
    assert {r["index"]: r["token_ids"] for r in found} == expected


def test_exit_codes_and_lines(ended):
    assert {name: run[0] for name, run in ended.items()} == {n: run[1] for n, run in RUNS.items()}
    err = {name: said.strip().splitlines() for name, (_, _, said) in ended.items()}
    for name in ("INT", "TERM"):
        assert [line.rpartition(" after ")[0] for line in err[name]] == ["interrupted"]
    assert len(err["full"]) == 1
    assert "File too large; --resume goes on after the results it has" in err["full"][0]
    assert err["pipe"] == []
    assert json.loads(ended["pipe"][1])["index"] in range(COUNT)
