"""``bench suite``: a GPU's first minutes as a run-book that may be cut off at any moment.

``python -m bench suite --minutes 8 --out DIR`` runs pieces in order of their worth. Each is bounded
in time, and none can stop the next: they run in one worker process, which is replaced when a piece
hangs or crashes it. Every finding is a line of ``DIR/suite.jsonl``, written when it is found; a
second start with that file goes on where the first stopped. Tuned tiles go to
``DIR/<device>.json``, what pieces print to ``DIR/suite.log``, the table of bars to
``DIR/summary.txt``. ``--dry-run`` does all of it on a CPU with small sizes.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import torch
from rich.console import Console

from bench.suite.progress import Lines
from bench.suite.summary import summary_table
from bench.suite.supervisor import supervise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench suite``."""
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--out", type=Path, required=True, help="folder for lines, log and tiles")
    parser.add_argument("--dry-run", action="store_true", help="small sizes on the CPU")
    parser.add_argument(
        "--fused-moe-source", type=Path, help="folder with vLLM's fused_moe.py, as a peer"
    )
    # How the suite starts itself again as the worker: seconds it may take.
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Run what is not finished; returns 1 when a piece failed."""
    if args.worker is not None:
        return _work(args)
    args.out.mkdir(parents=True, exist_ok=True)
    if Lines(args.out).find("start", dry_run=not args.dry_run):
        kinds = ("a dry run's", "a GPU's") if args.dry_run else ("a GPU's", "a dry run's")
        raise ValueError(f"--out must be empty or hold {kinds[0]} lines, got {kinds[1]}")
    if not args.dry_run and not torch.cuda.is_available():
        raise ValueError("suite needs a CUDA device, found none; --dry-run needs none")
    command = [sys.executable, "-m", "bench", "suite", "--out", str(args.out)]
    command += ["--minutes", str(args.minutes), *(["--dry-run"] if args.dry_run else [])]
    if args.fused_moe_source:
        command += ["--fused-moe-source", str(args.fused_moe_source)]
    worker = lambda seconds: [*command, "--worker", f"{seconds:.1f}"]
    trouble = supervise(worker, args.out, args.minutes, dry_run=args.dry_run)
    table = summary_table(Lines(args.out))
    with (args.out / "summary.txt").open("w") as file:
        Console(file=file, width=110).print(table)
    Console(width=110).print(table)
    for name, reason in trouble.items():
        print(f"{name}: {reason}")
    return int(bool(trouble))


def _work(args: argparse.Namespace) -> int:
    """The worker's side; what it needs is imported by it alone."""
    if args.dry_run:  # Triton reads it when it is first imported
        os.environ["TRITON_INTERPRET"] = "1"
    from bench.suite import machine, tuning
    from bench.suite.runbook import MINUTES, run_book
    from bench.suite.session import Session
    from bench.suite.sizes import DRY, FULL
    from bench.suite.worker import work

    logging.basicConfig()  # to the log, where it is told what runs, and why not something faster
    for room in ("decoder", "moesd_kernels"):
        logging.getLogger(room).setLevel(logging.INFO)
    device = torch.device("cpu" if args.dry_run else "cuda")
    sizes = DRY if args.dry_run else FULL
    session = Session(device, sizes, Lines(args.out, device), args.out, args.fused_moe_source)
    with machine.builds_in_background(session):
        tuning.use_tiles(session)
        work(session, run_book(sizes), args.worker, args.minutes / MINUTES)
    return 0
