"""``bench roofline``: this machine's ceilings, and the description the planner predicts from."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.measure.ceilings import measure_ceilings
from bench.measure.machine import machine_with_kernels
from bench.measure.record import Recorder
from bench.workloads.arguments import add_machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench roofline``."""
    parser.add_argument("--machine", type=Path, help="write the machine description to this JSON")
    add_machine(parser)


def run(args: argparse.Namespace) -> None:
    """Measure, print, and write what was asked for."""
    device = torch.device(args.device)
    ceilings = measure_ceilings(device)
    machine = machine_with_kernels(device, torch.bfloat16)
    table = Table(title=machine.name)
    table.add_column("ceiling")
    table.add_column("measured", justify="right")
    table.add_row("read", f"{ceilings.read / 1e9:.1f} GB/s")
    table.add_row("copy (read + write)", f"{ceilings.copy / 1e9:.1f} GB/s")
    for name, rate in ceilings.peak.items():
        table.add_row(f"{name} matrix product", f"{rate / 1e9:.0f} GFLOP/s")
    table.add_row("one operator call", f"{machine.launch * 1e6:.1f} µs")
    Console().print(table)
    Recorder(args.out, device).write(
        "roofline", ceilings=asdict(ceilings), machine=machine.to_json()
    )
    if args.machine:
        args.machine.write_text(json.dumps(machine.to_json(), indent=1) + "\n")
