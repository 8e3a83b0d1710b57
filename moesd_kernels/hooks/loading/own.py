"""Models that ``quantize`` made, out of the folders that ``save_pretrained`` made of them.

transformers loads integers into whatever module has their name. Of a folder whose config says that
they are ours it asks this quantizer, which quantises the empty model in the same way before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moesd_kernels.formats import KeepsScales
from moesd_kernels.hooks.packed import SCALE
from moesd_kernels.hooks.quantize import METHOD, QuantizedExperts, quantize


def own_mappings() -> dict[str, dict[str, Any]]:
    """What transformers is told of our method: by the names of its tables, name to class."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class OwnConfig(QuantizationConfigMixin):
        """The calls of ``quantize`` that made a model, in their order."""

        def __init__(self, steps: Any = (), **others: Any) -> None:
            self.quant_method: Any = METHOD
            self.steps = _checked(steps)

    class OwnQuantizer(HfQuantizer):
        requires_calibration = True  # which says that a model must have been quantised before
        # Scales may have been saved by expert, as weights are: transformers 5.17 does so.
        serialized_names = {"weight": ["weight", "weight_scale"]}  # noqa: RUF012

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            config: Any = self.quantization_config
            with torch.device("cpu"):  # what activations are is found by computing
                for step in config.steps:
                    call = {name: value for name, value in step.items() if name != "of"}
                    for part in _parts(model, step.get("of")):
                        quantize(part, **call)

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            _require_scales(model)
            for module in model.modules():
                if isinstance(module, QuantizedExperts):
                    _restore_scales(module)
            return model

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return False

    return {
        "AUTO_QUANTIZATION_CONFIG_MAPPING": {METHOD: OwnConfig},
        "AUTO_QUANTIZER_MAPPING": {METHOD: OwnQuantizer},
    }


def _parts(model: nn.Module, kind: str | None) -> list[nn.Module]:
    """What a step was of, by the name of its class: parts of the model, or else all of it.

    The files of one class are loaded as another, too: a causal LM's as a classifier.
    """
    if type(model).__name__ == kind:
        return [model]
    return [part for part in model.modules() if type(part).__name__ == kind] or [model]


def _require_scales(model: nn.Module) -> None:
    """Refuse matrices whose scales were in no file: they were saved as numbers, or not at all.

    Raises:
        ValueError: says which is the first.
    """
    for owner, module in model.named_modules():
        for leaf in module.scale_names if isinstance(module, KeepsScales) else ():
            scale = module._parameters.get(leaf)
            # transformers' mark of what it has loaded; the others are whatever memory held.
            if scale is not None and not getattr(scale, "_is_hf_initialized", False):
                raise ValueError(
                    f"the files have no {owner}.{leaf}: {METHOD}'s steps in their config say that "
                    f"{type(model).__name__} was quantised there"
                )


def _restore_scales(experts: QuantizedExperts) -> None:
    """Give a scale for a whole row its last axis, of size 1, which transformers 5.17 squeezes."""
    for name in experts.scale_names:
        scale = experts._parameters.get(name)
        weight = experts._parameters.get(name.removesuffix(SCALE))
        if scale is not None and weight is not None and scale.ndim < weight.ndim:
            scale.data = scale.data[..., None]


def _checked(steps: Any) -> list[dict[str, Any]]:
    """Steps out of a file, which may say anything.

    Raises:
        ValueError: they are not what ``quantize`` is called with.
    """
    names = {"weight_format": (str,), "group": (int, type(None)), "linears": (bool,)}
    known = names | {"of": (str,)}  # not yet there in older files
    fits = isinstance(steps, list) and all(
        isinstance(step, dict)
        and names.keys() <= step.keys() <= known.keys()
        and all(type(value) in known[name] for name, value in step.items())
        for step in steps
    )
    if not fits:
        raise ValueError(f"steps of {METHOD} must each have {', '.join(names)}, got {steps!r}")
    return list(steps)
