"""Experts that wait in host memory, and are copied to a GPU when a step needs them.

A kernel reads weights from one tensor of its device, where address space cannot be left without
memory. So there is a tensor of places for experts of all layers, and tokens are sent to places.
Copies run on the stream of the kernels: one that overwrites a place waits for whoever reads it.
Not run on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decoder.errors import UserError

from .files import OpenFiles
from .layout import Layout, files_of
from .residency import Key
from .store import ExpertStore


class DeviceStore(ExpertStore):
    """Experts in host memory, pinned where it is a GPU's; those that have been copied in places.

    Args:
        layout: see ``ExpertStore``; every layer's experts have the same shapes.
        budget: bytes of the device's memory for experts.
        device: that computes them.

    Raises:
        UserError: a budget below one layer's experts, experts that differ from layer to layer, or a
            file that cannot be read.
    """

    def __init__(self, layout: Layout, budget: int, device: torch.device) -> None:
        # One stream is no place to bring anything ahead of what is being computed.
        super().__init__(layout, budget, prefetch=False)
        if len({tuple((p.name, p.shape, p.dtype) for p in own) for own in self._layers}) > 1:
            raise UserError("experts that are copied to a GPU must have one shape in all layers")
        self._device = device
        self._host = self._read(layout, pinned=device.type == "cuda")
        pool = {
            p.name: torch.zeros(self.places, *p.shape[1:], dtype=p.dtype, device=device)
            for p in self._layers[0]
        }
        self.weights = [pool] * len(self._layers)
        self._place: dict[Key, int] = {}
        self._free = list(range(self.places))
        self._copied: list[Key] = []

    def _read(self, layout: Layout, pinned: bool) -> list[dict[str, Tensor]]:
        """All experts, by layer and parameter."""
        files = OpenFiles(files_of(layout))
        try:
            host = []
            for own in self._layers:
                host.append(
                    {p.name: torch.empty(p.shape, dtype=p.dtype, pin_memory=pinned) for p in own}
                )
                for projection in own:
                    stored = host[-1][projection.name].view(torch.uint8).numpy()
                    for expert, extents in enumerate(projection.experts):
                        files.read_all(extents, memoryview(stored[expert]).cast("B"))
            return host
        finally:
            files.close()

    def _start(self, key: Key) -> None:
        self._place[key] = place = self._free.pop()
        layer, expert = key
        for name, pool in self.weights[layer].items():
            pool[place].copy_(self._host[layer][name][expert], non_blocking=True)
        self._copied.append(key)

    def _settle(self) -> list[BaseException]:
        while self._copied:
            self._residency.admit(self._copied[-1])
            self._copied.pop()
        held = self.places - self._residency.free
        if (len(self._place), len(self._free)) != (held, self._residency.free):  # interrupted
            self._place = {k: place for k, place in self._place.items() if k in self._residency}
            self._free = list(set(range(self.places)) - set(self._place.values()))
        return []

    def _drop(self, key: Key) -> None:
        self._free.append(self._place.pop(key))

    def _ids_there(self, layer: int, ids: Tensor) -> Tensor:
        count = self._layers[layer][0].shape[0]
        places = [self._place.get((layer, expert), -1) for expert in range(count)]
        # The last row is for ids outside the layer, which stand for no expert.
        table = torch.tensor([*places, -1], device=ids.device)
        return table[torch.where((ids >= 0) & (ids < count), ids, count)]
