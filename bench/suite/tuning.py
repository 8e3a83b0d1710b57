"""Tiles found on this device, kept in the suite's folder and used from there."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch

from bench.suite.session import OutOfTimeError, Session
from bench.tuning.compiling import Job, compile_jobs
from bench.tuning.search import candidate_jobs, tune_shape
from bench.workloads.shapes import Shape
from moesd_kernels.experts.triton import tuned
from moesd_kernels.experts.triton.device import device_of

# Seconds a shape wants at the least; compiling may take this share of the piece.
SHAPE_S = 12.0
COMPILING = 0.4


def use_tiles(session: Session) -> None:
    """Let the back-end find the folder's tiles, if tuning has written any."""
    if session.lines.find("tune"):
        tuned.use_folder(session.folder)
        session.tuned = True


def tune(session: Session) -> None:
    """Search tiles for the listed layers, most telling first; one line for each number of tokens.

    Raises:
        OutOfTimeError: layers are left.
    """
    session.release()
    todo = {name: _untuned(session, name) for name in session.sizes.tuned}
    todo = {name: tokens for name, tokens in todo.items() if tokens}
    # Interpreted, as in a dry run, products of bf16 are wrong.
    dtype = torch.bfloat16 if session.cuda else torch.float16
    try:
        if session.cuda:
            _compile(session, todo, dtype)
        for number, (name, tokens) in enumerate(todo.items()):
            session.need(SHAPE_S)
            share = session.left() / (len(todo) - number)
            _tune(session, session.sizes.shapes[name], tokens, dtype, share)
    finally:
        use_tiles(session)
    if any(_untuned(session, name) for name in todo):
        raise OutOfTimeError


def _untuned(session: Session, name: str) -> list[int]:
    shape = list(session.sizes.shapes[name])
    done = {line["T"] for line in session.lines.find("tune", shape=shape)}
    return [T for T in session.sizes.tuned[name] if T not in done]


def _compile(session: Session, todo: dict[str, list[int]], dtype: torch.dtype) -> None:
    device = device_of(session.device)
    jobs: dict[Any, Job] = {}
    for name, tokens in todo.items():
        shape, limit = session.sizes.shapes[name], session.sizes.candidates
        jobs |= candidate_jobs(shape, tokens, dtype, device, limit)
    seconds = COMPILING * session.left()
    begin = time.monotonic()
    late, _ = compile_jobs(list(jobs.values()), dtype, session.device, seconds)
    took = round(time.monotonic() - begin, 1)
    session.lines.write("compiled-candidates", calls=len(jobs), late=late, seconds=took)


def _tune(
    session: Session, shape: Shape, tokens: list[int], dtype: torch.dtype, budget_s: float
) -> None:
    found = tune_shape(
        shape,
        tokens,
        dtype,
        candidates=session.sizes.candidates,
        rounds=session.sizes.rounds,
        budget_s=budget_s,
        folder=session.folder,
        device=session.device,
    )
    for result in found:
        config = asdict(result["config"])
        session.lines.write("tune", shape=list(shape), **result | {"config": config})
