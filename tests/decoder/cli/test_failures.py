"""The one place that turns failures into lines, and streams that cannot be written to."""

import io
import os
import signal
import sys

import pytest

from decoder.__main__ import main
from decoder.cli import plan
from decoder.cli.streams import Terminated, unwinding_signals
from decoder.errors import RequestFailed, UserError

PLAN = ["plan", "--target", "olmoe", "--machine", "h200", "--batch-sizes", "8", "--gammas", "2"]


def failing(monkeypatch, error):
    def run(args):
        raise error

    monkeypatch.setattr(plan, "run", run)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("expected a, got b"), 2, "moesd: error: expected a, got b"),
        (UserError("two\nlines \x1b[1m"), 2, "moesd: error: two lines \\x1b[1m"),
        (RequestFailed("1 of 2 failed", []), 1, "moesd: error: 1 of 2 failed"),
        (OSError(28, "No space left on device"), 1, "moesd: error: No space left on device"),
        (KeyError("name"), 70, "moesd: error: KeyError: 'name' (python -m decoder --debug"),
        (RuntimeError("a\nb"), 70, "moesd: error: RuntimeError: a b (python -m decoder --debug"),
        (RecursionError(), 70, "moesd: error: RecursionError (python -m decoder --debug"),
        (MemoryError(), 70, "moesd: error: MemoryError (python -m decoder --debug"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Terminated(signal.SIGTERM), 143, "interrupted"),
        (BrokenPipeError(), 141, None),
    ],
)  # fmt: skip
def test_a_failure_is_one_line_and_a_code(monkeypatch, capsys, error, code, line):
    failing(monkeypatch, error)
    assert main(PLAN) == code
    said = capsys.readouterr().err.splitlines()
    assert len(said) == (line is not None)
    assert not said or said[0].startswith(line)


def test_debug_shows_the_traceback(monkeypatch, capsys):
    failing(monkeypatch, KeyError("name"))
    with pytest.raises(KeyError, match="name"):
        main(["--debug", *PLAN])
    failing(monkeypatch, UserError("mistake"))
    with pytest.raises(UserError, match="mistake"):
        main(["--debug", *PLAN])


def test_debug_alone_is_the_demo_and_a_command_follows_it(monkeypatch):
    ran = []
    monkeypatch.setattr(plan, "run", lambda args: ran.append(args.debug) or 0)
    monkeypatch.setattr("decoder.cli.demo.run", lambda args: ran.append("demo") or 0)
    assert main(["--debug", *PLAN]) == main(PLAN) == main(["--debug"]) == main([]) == 0
    assert ran == [True, False, "demo", "demo"]


@pytest.mark.parametrize("stream", ["missing", "full", "closed"])
def test_a_broken_standard_error_raises_nothing(monkeypatch, stream):
    broken = None if stream == "missing" else open("/dev/full", "w")  # noqa: SIM115
    if stream == "closed":
        broken.close()
    failing(monkeypatch, UserError("mistake"))
    monkeypatch.setattr(sys, "stderr", broken)
    assert main(PLAN) == 2


def test_standard_output_that_is_closed_or_full(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(PLAN) == 2
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
    assert main(PLAN) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("cannot write to standard output: it is closed")
    assert said[1] == "moesd: error: No space left on device"


def test_signals_unwind_unless_somebody_handles_them():
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(Terminated) as stop, unwinding_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert stop.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with unwinding_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second in the C locale
def test_a_terminal_without_greek_gets_escapes(monkeypatch, errors):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors)
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(PLAN) == 0
    stream.flush()
    assert rb"\u03b3" in stream.buffer.getvalue()
