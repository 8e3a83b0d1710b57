"""``bench suite``: everything for one GPU machine, in resumable pieces of under nine minutes.

Each piece is a command in a process of its own (a process that has run several multi-gigabyte
shapes measures the next one slower). A finished piece leaves a marker in the output folder and is
skipped when the suite is started again; its log stays beside it. ``--dry-run`` runs the same pieces
on a CPU with small shapes, so that no GPU minute is spent on debugging.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

PIECE_LIMIT_S = 9 * 60
LAYER_SHAPES = ("qwen2-57b", "qwen3-30b", "mixtral", "olmoe", "deepseek-v3")
LAYER_TOKENS = "1,2,3,4,5,6,7,8,12,16,24,32,48,64,96,128,160,256,320,512"
PAPER_PRESETS = ("qwen2-57b-a14b", "qwen3-30b-a3b", "mixtral-8x7b")
PAPER_BATCHES = "1,2,4,8,16,24,32,48,64,100"
SANITIZED_TEST = "tests/kernels/triton/test_gpu.py"


@dataclass(frozen=True, slots=True)
class Piece:
    """A named command; ``needs`` is a program without which the piece is reported as not run."""

    name: str
    command: tuple[str, ...]
    needs: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench suite``."""
    parser.add_argument("--kernels", action="store_true", help="kernel tests, tuning, measurements")
    parser.add_argument("--decode", action="store_true", help="the paper's experiment, end to end")
    parser.add_argument("--out", type=Path, required=True, help="folder for lines, logs, markers")
    parser.add_argument("--dry-run", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--budget", type=float, default=float("inf"), help="stop after s seconds")


def run(args: argparse.Namespace) -> int:
    """Run what is not finished; returns 1 when a piece failed."""
    pieces: list[Piece] = []
    if args.kernels:
        pieces += kernel_pieces(args.out, args.dry_run)
    if args.decode:
        pieces += decode_pieces(args.out, args.dry_run)
    if not pieces:
        raise ValueError("say --kernels, --decode, or both")
    args.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    outcomes = {}
    for piece in pieces:
        if time.monotonic() - begin > args.budget:
            outcomes[piece.name] = "left for the next start"
            continue
        outcomes[piece.name] = run_piece(piece, args.out)
        print(f"{piece.name}: {outcomes[piece.name]}", flush=True)
    _print(outcomes)
    return int(any(outcome.startswith("failed") for outcome in outcomes.values()))


def run_piece(piece: Piece, out: Path) -> str:
    """Run one piece unless its marker says it is done; returns what became of it."""
    marker = out / f"{piece.name}.done"
    if marker.exists():
        return "done before"
    if piece.needs and not shutil.which(piece.needs):
        return f"not run: no {piece.needs} here"
    begin = time.monotonic()
    with (out / f"{piece.name}.log").open("w") as log:
        try:
            code = subprocess.run(
                piece.command, stdout=log, stderr=subprocess.STDOUT, timeout=PIECE_LIMIT_S
            ).returncode
        except subprocess.TimeoutExpired:
            return f"failed: over {PIECE_LIMIT_S} s, see {piece.name}.log"
    if code:
        return f"failed: exit code {code}, see {piece.name}.log"
    elapsed = time.monotonic() - begin
    marker.write_text(f"{elapsed:.0f} s\n")
    return f"done in {elapsed:.0f} s"


def kernel_pieces(out: Path, dry_run: bool) -> list[Piece]:
    """Tests, ceilings, tuning, the layer benchmark per shape and routing, pictures."""
    python, lines = sys.executable, str(out / "kernels.jsonl")
    bench = (python, "-m", "bench")
    # Without a GPU these tests would only be skipped: a dry run checks that they can be collected.
    pytest = (python, "-m", "pytest", "-q", "-m", "gpu", *(("--collect-only",) if dry_run else ()))
    memcheck = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1")
    device = ("--device", "cpu") if dry_run else ("--device", "cuda")
    shapes = ("embedded",) if dry_run else LAYER_SHAPES
    tokens = "1,4" if dry_run else LAYER_TOKENS
    rounds = ("--rounds", "3" if dry_run else "15")
    pieces = [
        Piece("gpu-tests", (*pytest, "tests/kernels")),
        Piece(
            "memcheck",
            (*memcheck, *pytest, SANITIZED_TEST, "-k", "skipped or variants"),
            needs="compute-sanitizer",
        ),
        Piece("roofline", (*bench, "roofline", *device, "--out", lines)),
    ]
    tune = (*bench, "tune", *(("--dry-run",) if dry_run else ()))
    pieces += [Piece(f"tune-{s}", (*tune, "--shape", s)) for s in shapes]
    for shape in shapes:
        layer = (*bench, "kernels", "--shape", shape, *device, *rounds, "--out", lines)
        peers = ("--peers", "grouped_mm,batched_mm")
        runs = {
            "uniform": (*layer, "--tokens", tokens, *peers),
            "correlated": (*layer, "--routing", "correlated", "--gammas", "4", *peers),
            "invariant": (*layer, "--tokens", tokens, "--batch-invariant", "--peers", "none"),
            "eager": (*layer, "--tokens", tokens, "--eager", *peers),
        }
        pieces += [Piece(f"layer-{shape}-{name}", command) for name, command in runs.items()]
    return [*pieces, Piece("kernel-plots", (*bench, "plot", lines, "--out", str(out)))]


def decode_pieces(out: Path, dry_run: bool) -> list[Piece]:
    """The paper's experiment per model, the fit on 21 points, the embedded pair, pictures."""
    python, lines = sys.executable, str(out / "decode.jsonl")
    bench = (python, "-m", "bench")
    device = ("--device", "cpu") if dry_run else ("--device", "cuda")
    size = ("--scale", "0.0005", "--new-tokens", "12", "--rounds", "1") if dry_run else ()
    batches = "1,2" if dry_run else PAPER_BATCHES
    pieces = [
        Piece(
            f"paper-{preset}",
            (
                *(*bench, "paper", "--preset", preset, *device, *size),
                *("--batch-sizes", batches, "--gammas", "2,3,4", "--out", lines),
            ),
        )
        for preset in PAPER_PRESETS
    ]
    pieces.append(
        Piece(
            "generate",
            (
                *(*bench, "generate", "--target", "embedded", *device),
                *("--batch-sizes", "1,2" if dry_run else "1,8,32,64"),
                *("--out", lines, "--rounds", "2" if dry_run else "5"),
            ),
        )
    )
    if not dry_run:  # a dry run has too few points to fit
        pieces.append(Piece("fit", (*bench, "fit", lines, "--profile", str(out / "profile.json"))))
    return [*pieces, Piece("decode-plots", (*bench, "plot", lines, "--out", str(out)))]


def _print(outcomes: dict[str, str]) -> None:
    table = Table("piece", "outcome")
    for name, outcome in outcomes.items():
        table.add_row(name, outcome)
    Console().print(table)
