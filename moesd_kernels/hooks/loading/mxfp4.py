"""gpt-oss checkpoints in MXFP4 on a machine without a GPU: blocks and scales as in the files.

transformers unpacks them there, and elsewhere holds them in the tensors of its own Triton kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesd_kernels.formats import WEIGHT_FORMATS
from moesd_kernels.hooks.packed import SCALE
from moesd_kernels.hooks.quantize import hold_quantized

_PROJECTIONS = ("gate_up_proj", "down_proj")


def mxfp4_quantizer(theirs: Any) -> Any:
    """transformers' quantizer of MXFP4 checkpoints, with experts that hold what the files do."""

    class Kept(theirs):
        def param_needs_quantization(self, *args: Any, **kwargs: Any) -> bool:
            return False

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            for module in model.modules():
                if type(module).__name__ == "GptOssExperts":
                    hold_quantized(module, "mxfp4", {n: _empty(module, n) for n in _PROJECTIONS})

        def update_weight_conversions(self, weight_conversions: Any, *args: Any) -> Any:
            return [*weight_conversions, *_conversions()]

        def get_state_dict_and_metadata(self, model: Any) -> Any:
            raise NotImplementedError(
                "a model whose MXFP4 weights were kept cannot be saved; its files are what it is"
            )

    return Kept


def _empty(experts: Any, name: str) -> tuple[Tensor, Tensor]:
    """Weight and scale of a projection ``[E, C, R]`` without memory."""
    E, C, R = experts._parameters[name].shape
    known = WEIGHT_FORMATS["mxfp4"]
    sizes = (R, known.width(C)), known.scale_shapes(R, C)[0]
    weight, scale = (torch.empty(E, *s, dtype=torch.uint8, device="meta") for s in sizes)
    return weight, scale


def _conversions() -> list[Any]:
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class AsRows(ConversionOps):
        """Blocks [E, R, C / 32, 16] as rows [E, R, C / 2]; scales are rows."""

        def convert(self, input_dict: Any, *args: Any, **kwargs: Any) -> Any:
            (found,) = input_dict.values()
            stored = found[0] if isinstance(found, list) else found
            return {kwargs["full_layer_name"]: stored.flatten(2)}

    return [
        WeightConverter(f"{name}_{kind}$", f"{name}{suffix}", [AsRows()])
        for name in _PROJECTIONS
        for kind, suffix in (("blocks", ""), ("scales", SCALE))
    ]
