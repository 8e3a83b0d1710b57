"""Loads a model without its routed experts, and lets the store bring them.

The experts' parameters are taken off the model while it has no memory yet, so that nothing loads
them, and put back as tensors of the store's. Their modules' forwards ask the store first.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from decoder.errors import UserError

from .device_store import DeviceStore
from .file_store import FileStore
from .layout import Layout, read_layout
from .settings import Offload
from .store import ExpertStore

_stores: weakref.WeakKeyDictionary[nn.Module, ExpertStore] = weakref.WeakKeyDictionary()
_SEAT = "_offloaded"  # a module's attribute


class _Seat:
    """A layer's place in a store. It goes with its module, and so forbids copies of that."""

    def __init__(self, store: ExpertStore, layer: int) -> None:
        self.store, self.layer = store, layer

    def __reduce__(self) -> NoReturn:
        raise UserError("a model whose experts are offloaded cannot be copied or pickled")


def store_of(model: Any) -> ExpertStore | None:
    """The store of a model whose experts are offloaded, or ``None``."""
    return _stores.get(model)


class ExpertsApart:
    """The loading of one model apart from its experts.

    Args:
        config: of the model.
        files: safetensors files that hold its experts.
        offload: where they wait, and the memory for them.
        device: that computes them.

    Attributes:
        config: of what is made: the text part, where a causal LM is no more of a model.
        model_class: whose ``from_pretrained`` loads everything else; what is wrong with the experts
            or the budget it says before that.

    Raises:
        UserError: weights that are quantised.
    """

    def __init__(
        self, config: Any, files: Iterable[Path], offload: Offload, device: torch.device
    ) -> None:
        from transformers import AutoModelForCausalLM

        if getattr(config, "quantization_config", None):
            raise UserError("experts can be offloaded in fp32, bf16 and fp16, got quantised ones")
        self._files, self._offload, self._device = list(files), offload, device
        self._names: list[str] = []
        self._store: ExpertStore | None = None
        with torch.device("meta"):
            own: Any = type(AutoModelForCausalLM.from_config(config))
        is_part = own.config_class is config.sub_configs.get("text_config")
        self.config: Any = config.get_text_config() if is_part else config
        take_off = self._take_off

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            own.__init__(self, *args, **kwargs)
            take_off(self)

        body = {"__init__": __init__, "__module__": own.__module__}
        self.model_class: Any = type(own.__name__, (own,), body)
        self._own = own

    def _take_off(self, model: Any) -> None:
        """Leave the experts' modules without parameters, so that nothing fills them."""
        layout = read_layout(model, self._files)
        with torch.device("cpu"):  # models are made where tensors have no memory
            self._store = self._make_store(layout)
        for name, projections in layout.items():
            module = model.get_submodule(name)
            module._is_hf_initialized = True  # transformers would draw what it has not loaded
            for projection in projections:
                module._parameters.pop(projection.name)
            if self._offload.host and any(n.endswith("_bias") for n in module._parameters):
                raise UserError(f"{name} has biases, which are not copied to a GPU with experts")
        self._names = list(layout)

    def _make_store(self, layout: Layout) -> ExpertStore:
        if self._offload.host:
            return DeviceStore(layout, self._offload.budget, self._device)
        return FileStore(layout, self._offload.budget)

    def attach(self, model: Any, found: dict[str, Any]) -> None:
        """Give the loaded model its experts, and its class.

        Args:
            model: of ``model_class``.
            found: what ``from_pretrained`` says of the weights; experts are no longer left over.
        """
        store = self._store
        assert store is not None  # made with the model
        model.__class__ = self._own
        # What was loaded is mapped from the files. Touching it would bring in what lies around it,
        # experts for the most part, by megabytes.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        if isinstance(store, FileStore):
            store.leave_page_cache()
        for layer, name in enumerate(self._names):
            module = model.get_submodule(name)
            for leaf, tensor in store.weights[layer].items():
                module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
            setattr(module, _SEAT, _Seat(store, layer))
            module.forward = types.MethodType(_forward, module)
            module.register_state_dict_pre_hook(_refuse_state_dict)
            if isinstance(store, DeviceStore):
                module.num_experts = store.places
                module.register_forward_pre_hook(_keep_from_graphs)
        _stores[model] = store
        found["unexpected_keys"] = {
            name for name in found["unexpected_keys"] if not self._has(name)
        }

    def _has(self, name: str) -> bool:
        """Whether this is an experts' parameter, by the name in its model or below its prefix."""
        module, _, leaf = name.rpartition(".")
        assert self._store is not None
        return any(
            own.endswith(module) and leaf in weights
            for own, weights in zip(self._names, self._store.weights, strict=True)
        )


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, *args: Any) -> Any:
    """The module's own forward, its experts in memory."""
    seat: _Seat = getattr(self, _SEAT)
    for name, tensor in seat.store.weights[seat.layer].items():
        if getattr(self, name).data_ptr() != tensor.data_ptr():
            raise UserError(
                f"{name} of {type(self).__name__} is offloaded and has been moved, converted or "
                "replaced; load the model as it is to be"
            )
    with seat.store.resident(seat.layer, top_k_index) as places:
        return type(self).forward(self, hidden_states, places, *args)


def _keep_from_graphs(*_: Any) -> None:
    """No graph is made of a model with hooks: it would hold none of what a store does."""


def _refuse_state_dict(*_: Any) -> NoReturn:
    raise UserError("offloaded experts are in their files alone, and in no state dict")
