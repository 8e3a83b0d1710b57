"""Capturing work as a CUDA graph, so that a failure leaves the process as it was.

``CapturedCalls`` replays functions whose arguments change: they run on buffers of fixed size, into
which the arguments are copied.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# By device, one for all captures: graphs reuse each other's memory only on the same stream, and
# cuBLAS keeps a workspace of tens of megabytes for every stream it has seen.
_STREAMS: dict[int, torch.cuda.Stream] = {}
# Graphs whose capture failed. Torch's allocator goes on asking them which memory is theirs.
_ABANDONED: list[torch.cuda.CUDAGraph] = []
# Calls kept. A run of a hundred rows that end one by one has some sixty shapes of rounds, of four
# calls each; what is dropped is captured again when it comes back.
MAX_ENTRIES = 256
# Of what torch says where something waits for the device. Other failures may be another thread's.
_WAITS = "synchronizing"
_captured = 0


def captured() -> int:
    """Calls that this process has captured so far, each of which took longer than a round."""
    return _captured


def capture(
    run: Callable[[], Result], pool: Any = None, device: torch.device | None = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Warm ``run`` up, and capture it.

    Args:
        pool: of an earlier graph, whose memory is shared.
        device: that ``run`` computes on, by default the current one. A graph of another device's
            stream would be empty, and a replay of it nothing.

    Returns:
        The graph, and what ``run`` returned inside it; the first replay uploads the graph.

    Raises:
        RuntimeError: ``run`` cannot be captured, and why; the current stream and the device are as
            before.
    """
    with torch.cuda.device(device):
        return _captured_there(run, pool)


def _captured_there(run: Callable[[], Result], pool: Any) -> tuple[torch.cuda.CUDAGraph, Result]:
    """``capture`` on the current device."""
    device = torch.cuda.current_device()
    stream = _STREAMS.get(device) or _STREAMS.setdefault(device, torch.cuda.Stream())
    stream.wait_stream(torch.cuda.current_stream())
    # `torch.cuda.graph` leaves its stream the current one when a capture fails: this block takes it
    # back.
    with torch.cuda.stream(stream):
        # Compilation, autotuning and workspace allocation happen outside the capture.
        for _ in range(2):
            run()
        with _refusing_synchronization():  # in a capture that would be harder to recover from
            run()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                result = run()
        except RuntimeError:
            _ABANDONED.append(graph)
            del _STREAMS[device]  # its allocations would go on being that graph's
            raise
    torch.cuda.current_stream().wait_stream(stream)
    return graph, result


@contextmanager
def _refusing_synchronization() -> Iterator[None]:
    """Operations that wait for the device raise a RuntimeError in this block."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class CapturedCalls:
    """Functions of tensors, run in buffers of fixed size; one graph and its buffers per key.

    The least recently used are dropped; all graphs share their memory.

    Args:
        capture: replay CUDA graphs; otherwise call the function on the padded buffers each time,
            which does the same on any device.
        insist: raise where a function waits for the device; otherwise nothing more is captured,
            and the log says why.
    """

    def __init__(self, capture: bool, insist: bool = True) -> None:
        self.capture, self._insist = capture, insist
        self._entries: dict[Hashable, _Entry] = {}  # the least recently used first
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Drop every graph: what was captured is no longer what the functions do."""
        self._entries.clear()
        self._pool = None  # went with its last graph

    @torch.inference_mode()  # buffers made in this mode stay in it
    def __call__(
        self,
        key: Hashable,
        function: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        batch: int,
        padding: Sequence[int],
    ) -> list[Tensor]:
        """What ``function(*inputs)`` returns, computed for ``batch`` rows.

        A function is captured, and run a few times before, on rows that are all padding. So it may
        write where its rows say, as long as padding writes nowhere that matters.

        Args:
            key: what else than the shapes of ``inputs`` and ``batch`` says what the function does,
                the addresses of what it reads and writes besides them included.
            function: the same in every call of a key; no host synchronisation, shapes a function
                of shapes, every result with ``batch`` rows. It is not kept: it is mostly a method
                of the owner.
            inputs: ``[B, ...]`` each; the function is given ``[batch, ...]``.
            batch: at least B.
            padding: of each input, the value of the rows from B on.

        Returns:
            ``[B, ...]`` each. Where graphs are captured, views of static tensors that the key's
            next call overwrites, and nothing else.

        Raises:
            RuntimeError: it cannot be captured, and why; nothing has changed.
        """
        shapes = tuple((x.shape[1:], x.dtype) for x in inputs)
        place = key, batch, shapes
        entry = self._entries.pop(place, None)
        if entry is None:
            entry = _Entry(inputs, batch, padding)
            if self.capture:
                self._capture(entry, function)
        self._entries[place] = entry
        if len(self._entries) > MAX_ENTRIES:
            del self._entries[next(iter(self._entries))]
        B = inputs[0].shape[0]
        entry.fill(inputs)
        if entry.graph is None:
            return [x[:B] for x in function(*entry.buffers)]
        entry.graph.replay()
        return entry.results(B)

    def _capture(self, entry: _Entry, function: Callable[..., Sequence[Tensor]]) -> None:
        try:
            # Its memory is not the graphs', which overwrite each other's in every replay.
            results = [torch.empty_like(x) for x in function(*entry.buffers)]

            def run() -> None:
                _copied(list(function(*entry.buffers)), results)

            entry.graph, _ = capture(run, self._pool, entry.buffers[0].device)
        except RuntimeError as error:
            if not self._insist and _WAITS in str(error):
                self.capture = False
                logger.warning("decoding goes on without CUDA graphs, slower: %s", _first(error))
                return
            error.add_note("decoding is captured in CUDA graphs; static=False runs without them")
            raise
        global _captured
        _captured += 1
        entry.outputs = results
        self._pool = entry.graph.pool()


class SharedMemory:
    """Memory that calls leave large tensors in for each other, instead of some in every key.

    An address belongs to the keys of what uses it: memory moves when it grows.
    """

    def __init__(self, device: torch.device) -> None:
        self._flat = torch.empty(0, device=device)
        self._views: dict[tuple[int, ...], Tensor] = {}

    @torch.inference_mode()
    def shaped(self, shape: tuple[int, ...], dtype: torch.dtype, largest: int) -> Tensor:
        """It as a tensor of ``shape``, at first of zeros, made for ``largest`` elements or more."""
        size = math.prod(shape)
        if self._flat.dtype != dtype or self._flat.numel() < size:
            self._flat = self._flat.new_zeros(max(size, largest), dtype=dtype)
            self._views.clear()
        if shape not in self._views:
            self._views[shape] = self._flat[:size].view(shape)
        return self._views[shape]


class _Entry:
    """The buffers of one key, all of them padding at first, and its graph."""

    def __init__(self, inputs: Sequence[Tensor], batch: int, padding: Sequence[int]) -> None:
        self.buffers = [
            x.new_full((batch, *x.shape[1:]), value)
            for x, value in zip(inputs, padding, strict=True)
        ]
        self.graph: Any = None  # torch.cuda.CUDAGraph | None
        self.outputs: list[Tensor] = []
        self._padding = [x.clone() for x in self.buffers]
        self._live = 0  # rows of the buffers that may be no padding
        # By rows of a call: making the same views again would cost more than copying into them.
        self._heads: dict[int, list[Tensor]] = {}
        self._tails: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._results: dict[int, list[Tensor]] = {}

    def fill(self, inputs: Sequence[Tensor]) -> None:
        """Copy ``[B, ...]`` inputs in, and padding over what a larger batch has left."""
        B = inputs[0].shape[0]
        targets = self._heads.get(B) or self._heads.setdefault(B, [x[:B] for x in self.buffers])
        sources = list(inputs)
        if self._live > B:
            if B not in self._tails:
                self._tails[B] = [x[B:] for x in self.buffers], [x[B:] for x in self._padding]
            tails, padding = self._tails[B]
            targets, sources = targets + tails, sources + padding
        self._live = max(self._live, B)
        torch._foreach_copy_(targets, sources)
        self._live = B

    def results(self, B: int) -> list[Tensor]:
        return self._results.get(B) or self._results.setdefault(B, [x[:B] for x in self.outputs])


def _copied(sources: list[Tensor], targets: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _first(error: RuntimeError) -> str:
    """The first line of a message, behind which torch explains itself at length."""
    return str(error).partition("\n")[0]
