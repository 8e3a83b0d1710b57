"""Real runs that are killed, fill a disk or lose their reader: every finished result is on disk,
and resuming completes them without loss or duplicate."""

import json
import os
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

# The exit code of each run: of the first three, after the signal that they are called by and are
# sent when they have some results. No file of "full" may exceed 8 KiB, and "pipe" writes to
# `head -1`.
RUNS = {"INT": 130, "TERM": 143, "KILL": -9, "full": 1, "pipe": 141}
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


# A shell starts one run, with its output streams closed. The others are forked from a process that
# has imported what they need, which is most of what a short run costs; each is then what
# `python -m decoder` is, down to how its interpreter ends.
COLD = "exec '{python}' -m decoder {arguments} >&- 2>&-"
FORKS = """
import json, os, resource, runpy, signal, subprocess, sys
import accelerate, decoder.cli.generate, decoder.cli.setup
from transformers.models.qwen3_moe import modeling_qwen3_moe

folder, runs, pids = sys.argv[1], json.loads(sys.argv[2]), {}
# A shell without a terminal has what it runs in the background ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
for name, arguments in runs.items():
    pids[name] = os.fork()
    if pids[name] == 0:
        break
else:
    print(json.dumps(pids), flush=True)
    ends = {name: os.waitpid(pid, 0)[1] for name, pid in pids.items()}
    print(json.dumps({name: os.waitstatus_to_exitcode(end) for name, end in ends.items()}))
    sys.exit()
for number, stream in ((1, "out"), (2, "err")):
    os.dup2(os.open(f"{folder}/{name}.{stream}", os.O_CREAT | os.O_WRONLY), number)
if name == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
if name == "pipe":
    head = subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE)
    os.dup2(head.stdin.fileno(), 1)
    head.stdin.close()
sys.argv[1:] = arguments
runpy.run_module("decoder", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def ended(folder):
    """All runs, side by side: exit code, standard output and standard error of each."""
    runs = {name: arguments(folder, name) for name in RUNS}
    runs["pipe"][-2:] = ["--json"]
    shell = COLD.format(python=sys.executable, arguments=" ".join(runs.pop("KILL")))
    killed = subprocess.Popen(["bash", "-c", shell], cwd=ROOT)
    forks = [sys.executable, "-c", FORKS, str(folder), json.dumps(runs)]
    with subprocess.Popen(forks, cwd=ROOT, stdout=subprocess.PIPE, text=True) as forked:
        pids = json.loads(forked.stdout.readline()) | {"KILL": killed.pid}
        deadline = time.monotonic() + 120
        waiting = set(SIGNALS)
        while waiting and time.monotonic() < deadline:
            for name in sorted(waiting):
                out = folder / f"{name}.jsonl"
                if out.exists() and out.read_bytes().count(b"\n") >= 3:
                    os.kill(pids[name], signal.Signals[f"SIG{name}"])
                    waiting.discard(name)
            time.sleep(0.005)
        codes = json.loads(forked.communicate(timeout=120)[0])
    codes["KILL"] = killed.wait(120)
    assert not waiting
    said = lambda name, stream: (folder / f"{name}.{stream}").read_text()
    return {
        name: (code, *("" if name == "KILL" else said(name, stream) for stream in ("out", "err")))
        for name, code in codes.items()
    }


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
    assert {name: run[0] for name, run in ended.items()} == RUNS
    err = {name: said.strip().splitlines() for name, (_, _, said) in ended.items()}
    for name in ("INT", "TERM"):
        assert [line.rpartition(" after ")[0] for line in err[name]] == ["interrupted"]
    assert len(err["full"]) == 1
    assert "File too large; --resume goes on after the results it has" in err["full"][0]
    assert err["pipe"] == []
    assert json.loads(ended["pipe"][1])["index"] in range(COUNT)
