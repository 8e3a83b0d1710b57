"""Every workspace starts poisoned: a value that was never written is seen in the result."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        # An expert, row or pair number this large lies outside every table.
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**28)

    monkeypatch.setattr(torch, "empty", poisoned)
