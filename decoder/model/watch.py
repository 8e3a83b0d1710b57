"""Whether a model is still what it was when it was read.

What runs past a model's modules (``lean.py``, ``graphs.py``) has read them once. Their owner may
load other weights, add an adapter or a hook, replace a module or convert the model at any time. A
weight that is changed in place needs no notice: its memory is shared.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter, eq, is_
from typing import Any

import torch.nn.modules.module as torch_module
from torch import Tensor, nn

# Attributes that forwards depend on, and that somebody may set on a module; an override of its
# forward is one that is not there yet.
_NAMES = ("forward", "scaling", "variance_epsilon", "attention_scaling", "top_k", "norm_topk_prob")
# Where transformers' own hooks are from: the first forward that is asked for hidden states leaves
# them on the layers, where they note outputs and change nothing.
_OWN_HOOKS = "transformers.utils.output_capturing"
_forward_of = attrgetter("forward")


class Watch:
    """A model at this moment, by the identity of its parts.

    A comparison takes about 2 us per layer, so that it can precede each forward: it goes through
    tables that are made here.

    Args:
        model: its modules, parameters, buffers, overrides and hooks are watched.
        tensors: those whose memory must stay where it is as well.
    """

    def __init__(self, model: nn.Module, tensors: Iterable[Tensor]) -> None:
        self._modules = modules = list(model.modules())
        self._types = list(map(type, modules))
        self._children = [m._modules for m in modules if m._modules]
        self._had = [dict(children) for children in self._children]
        leaves = [(table, name) for m in modules for table in _tables(m) for name in table]
        leaves += [(vars(m), name) for m in modules for name in _NAMES if _may_have(m, name)]
        # Turning training on or off is done to all modules together.
        leaves.append((vars(model), "training"))
        self._places, self._names = [table for table, _ in leaves], [name for _, name in leaves]
        self._values = list(map(dict.get, self._places, self._names))
        self._classes = list(set(self._types))
        self._forwards = list(map(_forward_of, self._classes))
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        self._hooked = self._count_hooks()
        self._tensors = list(tensors)
        self._buffers = [b for b in model.buffers() if not b.is_inference()]
        self._memory = self._read_memory()

    @property
    def hooked(self) -> bool:
        """Whether anybody looks at what goes through a module, or changes it."""
        return self._hooked > 0

    def unchanged(self) -> bool:
        """Whether everything is as it was."""
        return (
            all(map(eq, self._children, self._had))
            and all(map(is_, map(type, self._modules), self._types))
            and all(map(is_, map(dict.get, self._places, self._names), self._values))
            and all(map(is_, map(_forward_of, self._classes), self._forwards))
            and self._read_memory() == self._memory
            and self._count_hooks() == self._hooked
        )

    def _count_hooks(self) -> int:
        if not any(self._hooks):
            return 0
        every = (hook for hooks in self._hooks for hook in hooks.values())
        return sum(getattr(hook, "__module__", "") != _OWN_HOOKS for hook in every)

    def _read_memory(self) -> list[int]:
        """Where the tensors lie, and how often buffers, which are copied, have been written."""
        return [*map(Tensor.data_ptr, self._tensors), *[b._version for b in self._buffers]]


def is_bare(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's forward and nothing else."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _tables(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers


def _may_have(module: nn.Module, name: str) -> bool:
    return name == "forward" or name in vars(module)
