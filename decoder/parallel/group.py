"""The ranks of a run: how they find each other, and how the loss of one becomes one message."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from decoder.errors import RankLost, UserError, explained, reason

from .collectives import collective
from .environment import REQUIRED, local_rank, own_rank, world_size
from .mode import DEFAULT_TIMEOUT

_START = timedelta(minutes=30)  # ranks read the files at their own pace
_IDLE = timedelta(days=30)  # rank 0 may wait for prompts, and the others for it
_GRACE = 1.5  # seconds that ranks are given to say why they left
_STORE = timedelta(seconds=5)


class Ranks:
    """All ranks, as seen by this one; made in each, which waits for the others.

    Args:
        device: ``"cpu"`` or ``"cuda"``, by default a GPU where there are any, to each rank its own.
        timeout: seconds that a rank is waited for in a forward.

    Attributes:
        rank, size: this one, and how many there are.
        device: that this rank computes on.
        commands: the group over which rank 0 tells the others what to do.
        is_inside: whether this rank is in the middle of what all of them do, or was left there.

    Raises:
        UserError: the process was not started as one of several, there is no such device, or the
            others do not come.
    """

    def __init__(
        self, device: str | torch.device | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        missing = [name for name in REQUIRED if not os.environ.get(name)]
        if missing:
            raise UserError(
                "--parallel expects processes of torchrun (torchrun --nproc-per-node N -m decoder "
                f"generate ...), got no {missing[0]} in the environment"
            )
        self.rank, self.size = own_rank(), world_size()
        if self.size < 2:
            raise UserError(f"--parallel expects at least 2 ranks, got {self.size}")
        self.device = _device_of_rank(device)
        with explained("the ranks cannot meet"):
            store, _, _ = next(dist.rendezvous("env://", timeout=_START))
            self._store = dist.PrefixStore("moesd", store)
            on_gpu = self.device.type == "cuda"
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                store=store,
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=timeout),
                device_id=self.device if on_gpu else None,
            )
        self.commands = dist.new_group(backend="gloo", timeout=_IDLE)
        self._timeout = timeout
        self.is_inside = False
        self._turn = threading.RLock()
        self._over = ""  # why nothing can be run together any more
        atexit.register(self.leave)

    def require_same(self, what: dict[str, Any]) -> None:
        """Refuse ranks that are not alike; ``what`` must be this on each.

        Raises:
            UserError: the first difference, by rank.
            RankLost: one of them is gone.
        """
        every: list[Any] = [None] * self.size
        with self.together(), collective():
            dist.all_gather_object(every, what, group=self.commands)
        for rank, other in enumerate(every):
            for name, value in every[0].items():
                if other[name] != value:
                    raise UserError(
                        f"ranks must have the same {name}, got {value} on rank 0 and "
                        f"{other[name]} on rank {rank}"
                    )

    def wait_for_all(self) -> None:
        """Wait until every rank has come this far, however long it takes.

        Raises:
            RankLost: one of them never will.
        """
        with self.together(), collective():
            dist.barrier(group=self.commands)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that every rank runs: what fails in it, on any of them, ends the run.

        Threads take turns: the other ranks run one block after the other. Nothing can be tried
        again by one rank, for the others are in the middle of a sum with it. A refusal of the
        model is the same on all ranks, and stays what it is.

        Raises:
            RankLost: in place of any other exception.
        """
        with self._turn:
            if self._over:
                raise RankLost(self._over)
            self.is_inside = True
            try:
                yield
            except UserError as error:
                with suppress(Exception):
                    self._store.set(_left(self.rank), reason(error))
                raise
            except (Exception, RankLost) as error:
                lost = self._lost(error)
                self._over = str(lost)
                raise lost from error
            except BaseException:  # an interrupt, which says what there is to say
                self._over = "the run was interrupted in what all ranks do; start them again"
                self._claim()
                raise
            self.is_inside = False

    def leave(self) -> None:
        """Leave the run; ranks that are still in it lose this one."""
        self._claim()
        if dist.is_initialized():
            with suppress(Exception):
                dist.destroy_process_group()

    def may_speak(self) -> bool:
        """Whether this rank is the first that wants to say how the run ended."""
        try:
            return bool(self._store.add("said", 1) == 1)
        except Exception:  # gone with the process that kept it
            return self.rank <= 1

    def _claim(self) -> None:
        """Rank 0 has said what there is to say, or is about to."""
        if self.rank == 0:
            self.may_speak()

    def _lost(self, error: BaseException) -> RankLost:
        """What is known of the rank because of which ``error`` was raised here."""
        if threading.current_thread() is threading.main_thread():
            # torchrun ends the others as soon as one has ended: not before this one has spoken.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._claim()
        own = "" if isinstance(error, RankLost) else reason(error)
        try:
            said = self._said(own)
        except Exception:  # the store went with the process that kept it
            return RankLost("rank 0 is gone" if self.rank and not own else reason(error))
        for rank, why in sorted(said.items()):
            if why:
                return RankLost(f"rank {rank} failed: {why}")
        silent = [str(rank) for rank in range(self.size) if rank not in said]
        if not silent:
            return RankLost(reason(error))
        ranks = f"rank {silent[0]} is" if len(silent) == 1 else f"ranks {', '.join(silent)} are"
        late = "timed out" in str(error).lower()
        return RankLost(f"{ranks} {f'silent for {self._timeout:g} s' if late else 'gone'}")

    def _said(self, own: str) -> dict[int, str]:
        """Why ranks left, of those that say so in time; empty where they lost another one."""
        self._store.set_timeout(_STORE)
        self._store.set(_left(self.rank), own)
        deadline, said = time.monotonic() + _GRACE, {self.rank: own}
        while len(said) < self.size and time.monotonic() < deadline:
            for rank in range(self.size):
                if rank not in said and self._store.check([_left(rank)]):
                    said[rank] = self._store.get(_left(rank)).decode()
            time.sleep(0.02)
        return said


def _left(rank: int) -> str:
    return f"left/{rank}"


def _device_of_rank(device: str | torch.device | None) -> torch.device:
    """Where this rank computes: transformers divides models among GPUs where there are any."""
    there = "cuda" if torch.cuda.is_available() else "cpu"
    if device is not None and str(device) != there:
        hint = "; CUDA_VISIBLE_DEVICES= hides GPUs" if there == "cuda" else ""
        raise UserError(f"--parallel computes on {there} here, got --device {device}{hint}")
    if there == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())
