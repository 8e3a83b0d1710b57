"""The model that a decoder is given: taken as it is meant, and left as it was found.

Wrappers around the same modules are taken off, what makes a token depend on its batch is named, and
a constructor that raises undoes what it did.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from decoder.errors import UserError
from decoder.model.kernels import left_as_found
from decoder.model.support import check_loaded, warn_of_row_dependence

logger = logging.getLogger(__name__)

Self = TypeVar("Self")
P = ParamSpec("P")
Constructor = Callable[Concatenate[Self, Any, P], None]


def takes_target(constructor: Constructor[Self, P]) -> Constructor[Self, P]:
    """A constructor whose first argument, a model, is unwrapped and survives its errors."""

    @functools.wraps(constructor)
    def construct(self: Self, target: Any, *args: P.args, **kwargs: P.kwargs) -> None:
        model = unwrapped(target)
        check_loaded(model)
        warn_of_row_dependence(model)
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            logger.info("%s has accelerate's hooks and runs module by module", type(model).__name__)
        with left_as_found(model):
            constructor(self, model, *args, **kwargs)

    return construct


def unwrapped(model: Any) -> Any:
    """The transformers model in a wrapper of ``torch.compile`` or PEFT, or ``model`` itself.

    Raises:
        UserError: the wrapper adds something that its model does not do by itself.
    """
    inner = model
    if isinstance(model, torch.nn.Module) and hasattr(model, "_orig_mod"):
        inner = model._orig_mod
    elif type(model).__name__.startswith("PeftModel"):
        adapter = getattr(model, "active_peft_config", None)
        if getattr(adapter, "is_prompt_learning", False):
            raise UserError(
                f"{type(model).__name__} has {type(adapter).__name__}, which puts tokens before "
                "the prompt; expected an adapter of the model's own layers"
            )
        inner = model.get_base_model()
    if inner is not model:
        wrapper, name = type(model).__name__, type(inner).__name__
        logger.info("decoding with the %s inside %s", name, wrapper)
        return unwrapped(inner)
    return model
