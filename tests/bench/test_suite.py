"""The suite's pieces: resumable, bounded, and runnable dry before a GPU is at hand."""

from __future__ import annotations

import sys

import pytest

from bench.__main__ import COMMANDS
from bench.suite import Piece, decode_pieces, kernel_pieces, run_piece


def test_a_finished_piece_is_not_run_again(tmp_path):
    witness = tmp_path / "witness"
    script = f"open({str(witness)!r}, 'a').write('x')"
    piece = Piece("once", (sys.executable, "-c", script))
    assert run_piece(piece, tmp_path).startswith("done in")
    assert run_piece(piece, tmp_path) == "done before"
    assert witness.read_text() == "x"


def test_a_failed_piece_keeps_its_log_and_runs_again(tmp_path):
    piece = Piece("bad", (sys.executable, "-c", "print('why'); raise SystemExit(3)"))
    assert "exit code 3" in run_piece(piece, tmp_path)
    assert (tmp_path / "bad.log").read_text() == "why\n"
    assert not (tmp_path / "bad.done").exists()


def test_a_piece_without_its_tool_is_reported_as_not_run(tmp_path):
    piece = Piece("tool", (sys.executable, "-c", ""), needs="no-such-tool-anywhere")
    assert run_piece(piece, tmp_path) == "not run: no no-such-tool-anywhere here"


@pytest.mark.parametrize("dry_run", [False, True])
def test_pieces_have_distinct_names_and_known_commands(tmp_path, dry_run):
    pieces = kernel_pieces(tmp_path, dry_run) + decode_pieces(tmp_path, dry_run)
    names = [piece.name for piece in pieces]
    assert len(set(names)) == len(names)
    for piece in pieces:
        if "bench" in piece.command:
            assert piece.command[piece.command.index("bench") + 1] in COMMANDS
