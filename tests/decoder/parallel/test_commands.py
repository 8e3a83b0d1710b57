"""Messages arrive as they were sent, whatever they hold and however long they are."""

from __future__ import annotations

import pytest
import torch

from decoder.parallel import commands
from decoder.parallel.commands import CLOSE, END, RUN, SCRUB, Channel, Command

SENT = [
    Command(END),
    Command(CLOSE, 3),
    Command(SCRUB, 1, (4, 0)),
    Command(RUN, 2, (17, None, 255), (torch.arange(12).view(3, 4), None, torch.tensor([-1]))),
    Command(RUN, 2, (), (torch.empty(2, 0, dtype=torch.int64),)),
    *(Command(RUN, 1, (5,), (torch.arange(n),)) for n in (1015, 1016, 1017, 1018, 5000)),
]


@pytest.mark.parametrize("sent", SENT)
def test_what_is_sent_arrives(sent: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    wire: list[torch.Tensor] = []
    out, back = Channel(None), Channel(None)  # type: ignore[arg-type]
    monkeypatch.setattr(out, "_pass", lambda numbers: wire.append(numbers.clone()))
    monkeypatch.setattr(back, "_pass", lambda numbers: numbers.copy_(wire.pop(0)))
    out.send(sent)
    found = back.receive()
    assert not wire
    assert found[:2] == sent[:2]
    assert tuple(found.numbers) == tuple(sent.numbers)
    for ours, theirs in zip(found.tensors, sent.tensors, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours.shape == theirs.shape and torch.equal(ours, theirs))
    assert commands._FRONT == 1024  # what the lengths above are around
