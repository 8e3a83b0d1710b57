"""Tiles found on this device, kept in the suite's folder and used from there."""

from __future__ import annotations

from dataclasses import asdict

import torch

from bench.runs.tuning import tune_shape
from bench.suite.session import Session
from bench.workloads.shapes import Shape
from moesd_kernels.experts.triton import tuned

# What one (shape, T) wants: half of the candidates' compilation, and their replays.
SHAPE_S = 12.0


def use_tiles(session: Session) -> None:
    """Let the back-end find the folder's tiles, if tuning has written any."""
    if session.lines.find("tune"):
        tuned.use_folder(session.folder)
        session.tuned = True


def tune(session: Session) -> None:
    """Search tiles for the listed layers, most telling first; one line each.

    Raises:
        OutOfTimeError: layers are left.
    """
    session.release()
    try:
        for name, T in session.sizes.tuned:
            shape = session.sizes.shapes[name]
            if not session.lines.find("tune", shape=list(shape), T=T):
                session.need(SHAPE_S)
                _tune(session, shape, T)
    finally:
        use_tiles(session)


def _tune(session: Session, shape: Shape, T: int) -> None:
    # Interpreted, as in a dry run, products of bf16 are wrong.
    dtype = torch.bfloat16 if session.cuda else torch.float16
    (found,) = tune_shape(
        shape,
        [T],
        dtype,
        candidates=session.sizes.candidates,
        rounds=session.sizes.rounds,
        budget_s=min(session.left() / 2, 2 * SHAPE_S),
        folder=session.folder,
        device=session.device,
    )
    session.lines.write("tune", shape=list(shape), **found | {"config": asdict(found["config"])})
