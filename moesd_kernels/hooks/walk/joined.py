"""Several parameters as one matrix, without a second copy of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def may_join(parameters: list[nn.Parameter]) -> bool:
    """Whether ``joined`` takes nobody else's memory away; it may have been called before."""
    return _adjacent(parameters) or all(map(_is_alone, parameters))


def _is_alone(parameter: nn.Parameter) -> bool:
    """Whether nothing else would lose the parameter's memory if that moved."""
    storage = parameter.untyped_storage()
    holders: int = torch._C._storage_Use_Count(storage._cdata)
    owners = 2  # the parameter, and `storage` here
    return holders <= owners and storage.nbytes() == parameter.nbytes and not storage.is_shared()


def _adjacent(parameters: list[nn.Parameter]) -> bool:
    """Whether the parameters follow each other in one memory, as ``joined`` leaves them."""
    starts = [p.data_ptr() - parameters[0].data_ptr() for p in parameters]
    stored = [sum(p.nbytes for p in parameters[:i]) for i in range(len(parameters))]
    return starts == stored and len({p.untyped_storage().data_ptr() for p in parameters}) == 1


def joined(parameters: list[nn.Parameter]) -> Tensor:
    """The parameters as one tensor along dimension 0, without a second copy.

    The first time, the parameters become views of the joined tensor; a second runner over the same
    model finds them adjacent and takes them as they are. They stay parameters that can be trained:
    nothing is made in inference mode.
    """
    sizes, first = [p.shape[0] for p in parameters], parameters[0]
    with torch.inference_mode(False), torch.no_grad():
        if _adjacent(parameters):
            shape = (sum(sizes), *first.shape[1:])
            return first.data.as_strided(shape, first.stride(), first.storage_offset())
        joined = torch.cat([p.data for p in parameters])
        for parameter, part in zip(parameters, joined.split(sizes), strict=True):
            parameter.data = part
    return joined
