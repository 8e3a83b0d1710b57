"""Processes that are ranks of one run: what ``torchrun`` does, without its start-up time.

They are forked from a server that has imported what all of them need.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_FAMILIES = ("qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss", "deepseek_v3", "qwen3")
_context.set_forkserver_preload(
    [
        *(
            "decoder.cli.setup",
            "decoder.parallel.worker",
            "decoder.__main__",
            "torch.utils.flop_counter",
        ),
        *(f"transformers.models.{name}.modeling_{name}" for name in _FAMILIES),
    ]
)


def start(size: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> list[BaseProcess]:
    """Start ``work(*arguments)`` on ``size`` ranks; what rank r prints is in ``folder/r.txt``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        _context.Process(target=_run, args=(rank, size, port, folder, work, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes


def join(processes: list[BaseProcess], seconds: float = 120) -> list[int | None]:
    """Their exit codes, ``None`` for those that had to be killed."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def printed(folder: Path, rank: int) -> str:
    return (folder / f"{rank}.txt").read_text()


def _run(
    rank: int, size: int, port: int, folder: Path, work: Callable[..., Any], arguments: Any
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    log = os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        code = work(*arguments)
    except BaseException:
        traceback.print_exc()
        code = 99
    _leave(code or 0)


def _leave(code: int) -> None:
    """As an interpreter ends, which multiprocessing's children do not: exit handlers run."""
    import atexit

    atexit._run_exitfuncs()
    os._exit(code)


def report(folder: Path, rank: int, **found: Any) -> None:
    """Leave what a rank has found for ``reported``."""
    (folder / f"{rank}.json").write_text(json.dumps(found))


def reported(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{rank}.json").read_text())
    return found
