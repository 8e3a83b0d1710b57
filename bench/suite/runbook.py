"""The pieces of the suite, most valuable first, and what each may take of eight minutes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial

from bench.suite import compiling, decoding, layers, machine, testing, tuning
from bench.suite.session import Piece, Session
from bench.suite.sizes import Sizes

# What the shares below are written for.
MINUTES = 8.0


def run_book(sizes: Sizes) -> list[Piece]:
    """All pieces in order.

    The CUDA back-end is compiled from the start, beside the first pieces, so that its turn finds it
    ready. Shares add up to more than eight minutes, because most pieces end before theirs.
    """
    return [
        Piece("machine", 20, machine.describe),
        Piece("compile", 35, compiling.compile_kernels),
        Piece("first-tests", 30, partial(testing.run_tests, testing.FIRST)),
        *(
            Piece(f"layer-{name}", 30, partial(layers.measure, name, "auto"))
            for name in sizes.shapes
        ),
        Piece("cuda-tests", 20, partial(testing.run_tests, testing.CUDA), cuda_backend),
        *(
            Piece(f"cuda-{name}", 15, partial(layers.measure, name, "cuda"), cuda_backend)
            for name in sizes.shapes
        ),
        Piece("dense-tests", 30, partial(testing.run_tests, testing.DENSE)),
        Piece("step", 40, decoding.profile_steps),
        Piece("decode", 200, decoding.measure),
        Piece("fit", 10, decoding.fit),
        Piece("decoder-tests", 30, partial(testing.run_tests, testing.DECODER)),
        Piece("kernel-tests", 40, partial(testing.run_tests, testing.KERNELS)),
        Piece("tune", 150, tuning.tune),
        *(
            Piece(f"tuned-{name}", 15, partial(layers.measure, name, "auto"), tiles_for(name))
            for name in sizes.shapes
        ),
        Piece("memcheck", 60, testing.check_memory, compute_sanitizer),
    ]


def cuda_backend(session: Session) -> str | None:
    """Why the CUDA C++ back-end cannot run here."""
    from moesd_kernels.experts import cuda

    return cuda.unavailable_reason()


def compute_sanitizer(session: Session) -> str | None:
    """Why memory cannot be checked here."""
    if not session.cuda:
        return "no CUDA device"
    return None if shutil.which("compute-sanitizer") else "no compute-sanitizer here"


def tiles_for(name: str) -> Callable[[Session], str | None]:
    """Why there is nothing to measure again after tuning."""

    def refusal(session: Session) -> str | None:
        tuned = session.lines.find("tune", shape=list(session.sizes.shapes[name]))
        return None if tuned else "nothing was tuned"

    return refusal
