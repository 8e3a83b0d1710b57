"""Triton kernels of the layer and decode measurements, compiled before by several processes."""

from __future__ import annotations

import torch

from bench.suite.decoding import layer_jobs
from bench.suite.session import Session
from bench.tuning.compiling import Job, compile_jobs


def compile_kernels(session: Session) -> None:
    """Compile for every point of every shape; measurements compile what is missing.

    Raises:
        RuntimeError: a process failed; the log says why.
    """
    sizes = session.sizes
    jobs = [
        Job(shape, B * rows, source=session.source)
        for B, rows in sizes.points
        for shape in sizes.shapes.values()
    ]
    jobs += layer_jobs(session)
    late, codes = compile_jobs(jobs, torch.bfloat16, session.device, session.left())
    session.lines.write("compiled", layers=len(jobs), processes=len(codes), late=late)
    if late < sum(code != 0 for code in codes):
        raise RuntimeError(f"compiling processes ended with codes {codes}, {late} of them late")
