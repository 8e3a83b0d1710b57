"""A model that transformers has sharded, made of plain modules again.

transformers' plan decides who holds what and loads each rank's part, as ``DTensor`` parameters
behind forwards of its own. Those run neither our kernels nor rows independently of each other. So
each parameter becomes the plain part that this rank holds, each module gets its class's forward
back, and what is left of the plan is one sum over ranks where partial results meet.

What transformers gathers at once (embedding, head, projections whose norms span all heads) is
whole on every rank.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from decoder.errors import UserError

from .collectives import summed

# transformers' styles of tensor parallelism, by what they leave to do after the module's forward.
_PARTIAL = ("rowwise", "all_reduce")  # sum
EXPERTS = "moe_tp_experts"  # sum, of all the experts' parts
_WHOLE = (
    "colwise_gather_output",
    "colwise_rep",
    "embedding_rowwise",
    "embedding_colwise",
    "rowwise_split_input",
    "rowwise_rep",
)
_NOTHING = (
    "colwise",
    "packed_colwise",
    "packed_rowwise",
    "replicate",
    "replicated_with_grad_allreduce",
    "mla_kv_a_proj",
    "local_params",
)
STYLES = {*_PARTIAL, EXPERTS, *_WHOLE, *_NOTHING}  # those that are known here


def style_of(name: str, plan: dict[str, str]) -> str | None:
    """What a plan says of a module or a parameter by its full name; layers are ``*`` there."""
    return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))


def unwrap_experts(model: nn.Module, rank: int) -> None:
    """Take over a model loaded by an expert-parallel plan: whole experts, divided among ranks.

    Args:
        model: as ``from_pretrained`` gives it.
        rank: this one; it holds the ``rank``-th of equal shares.

    Raises:
        UserError: the plan has divided something else.
    """
    for name, module in model.named_modules():
        module.__dict__.pop("forward", None)
        sharded = [p for p in module._parameters.values() if isinstance(p, DTensor)]
        if not sharded:
            continue
        if not all(p.placements[0].is_shard(0) for p in sharded) or not _takes_ids(module):
            raise UserError(
                f"transformers' plan divides {name} ({type(module).__name__}) among ranks; "
                "expected experts alone, and whole ones"
            )
        count = sharded[0].to_local().shape[0]
        _make_local(module)
        module.forward = types.MethodType(_local_experts(rank, count), module)


def unwrap_tensors(model: nn.Module, plan: dict[str, str], rank: int) -> None:
    """Take over a model loaded by a tensor-parallel plan.

    Args:
        model: as ``from_pretrained`` gives it.
        plan: its own, ``model.tp_plan``, of ``STYLES`` alone.
        rank: this one; rank 0 adds the biases of what is summed.
    """
    wholes: dict[DTensor, nn.Parameter] = {}  # tied ones stay tied
    for name, module in model.named_modules():
        module.__dict__.pop("forward", None)
        style = style_of(name, plan)
        if style in _WHOLE or isinstance(module, nn.Embedding):
            _make_whole(module, wholes)
            continue
        _make_local(module)
        if style == EXPERTS:
            module.forward = types.MethodType(_partial_experts, module)
        elif style in _PARTIAL:
            if rank and module._parameters.get("bias") is not None:
                module.bias = None
            module.register_forward_hook(_sum_output)


def _local_experts(rank: int, count: int) -> Callable[..., Tensor]:
    """A forward of this rank's ``count`` experts, summed with the others'."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, weights: Tensor) -> Tensor:
        elsewhere = top_k_index // count != rank
        # As transformers marks it, for whichever function runs the experts: no expert of ours.
        index = torch.where(elsewhere, count, top_k_index - rank * count)
        own = type(self).forward(self, hidden_states, index, weights.masked_fill(elsewhere, 0.0))
        return summed(own)

    return forward


def _partial_experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, weights: Tensor
) -> Tensor:
    """A forward of this rank's part of every expert, summed with the others'."""
    return summed(type(self).forward(self, hidden_states, top_k_index, weights))


def _sum_output(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return summed(output)


def _make_local(module: nn.Module) -> None:
    for name, parameter in module._parameters.items():
        if isinstance(parameter, DTensor):
            # A copy: a slice would keep the memory of the whole.
            part = parameter.to_local().detach().clone(memory_format=torch.contiguous_format)
            module._parameters[name] = nn.Parameter(part, requires_grad=False)


def _make_whole(module: nn.Module, wholes: dict[DTensor, nn.Parameter]) -> None:
    for name, parameter in module._parameters.items():
        if isinstance(parameter, DTensor):
            if parameter not in wholes:
                whole = nn.Parameter(parameter.detach().full_tensor(), requires_grad=False)
                wholes[parameter] = whole
            module._parameters[name] = wholes[parameter]


def _takes_ids(module: nn.Module) -> bool:
    """Whether these are experts behind transformers' interface, which skip ids they do not have."""
    return hasattr(module, "num_experts") and hasattr(module, "has_gate")
