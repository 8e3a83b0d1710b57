"""What a call of the expert layer consists of: its options, its weights, its routing.

The options are written in full here and in the schemas of ``csrc/register.cpp``, nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from torch import Tensor

from moesd_kernels.formats import WEIGHT_FORMATS

from .activations import canonical_activation


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """What the expert layer computes, apart from its tensors; hashable, and checked once.

    Attributes:
        activation: "silu", "gelu", "gelu_tanh", "relu" or "relu2"; an alias becomes one of these.
        gated: whether the first projection holds a gate.
        interleaved: gate and up rows alternate (gpt-oss) instead of lying in two halves.
        transposed: weights are ``[E, H, 2I]`` and ``[E, I, H]`` instead of ``[E, 2I, H]`` and
            ``[E, H, I]``.
        activation_limit: clamp before the activation: gate from above, up on both sides.
        activation_alpha: use gpt-oss's gate, ``gate * sigmoid(alpha * gate) * (up + 1)``.
        weight_format: a key of ``moesd_kernels.formats.WEIGHT_FORMATS``.
        down_format: of the down projection, where it has another; None where it is the same.
        int8_activations: round hidden states, and what goes into the down projection, to eight
            bits (``formats.round_to_int8``) where both formats' weights are integers; these are
            then not rounded to the dtype of the hidden states. On CPUs.
        op_options: all of them, in the order of the C++ schemas; derived.

    Raises:
        ValueError: unknown activation or format, or options that exclude each other.
    """

    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    activation_limit: float | None = None
    activation_alpha: float | None = None
    weight_format: str = "plain"
    down_format: str | None = None
    int8_activations: bool = False
    # Kept because a decode step cannot afford to put it together on every call.
    op_options: tuple[Any, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation", canonical_activation(self.activation))
        if self.down_format == self.weight_format:
            object.__setattr__(self, "down_format", None)
        for name, value in zip(("weight_format", "down_format"), self.formats, strict=True):
            if value not in WEIGHT_FORMATS:
                raise ValueError(f"{name} must be one of {sorted(WEIGHT_FORMATS)}, got {value!r}")
            if self.transposed and value != "plain":
                raise ValueError(
                    f"transposed=True needs {name}='plain': a block of quantised weights lies "
                    f"along a row; got {value!r}"
                )
        limit, alpha = self.activation_limit, self.activation_alpha
        if not self.gated and (self.interleaved or limit is not None or alpha is not None):
            raise ValueError(
                "interleaved, activation_limit and activation_alpha need gated=True, got "
                f"gated=False, interleaved={self.interleaved}, activation_limit={limit}, "
                f"activation_alpha={alpha}"
            )
        *values, _, _ = (getattr(self, option.name) for option in OPTIONS)
        options = *values, self.formats[1], self.int8_activations
        object.__setattr__(self, "op_options", options)

    @property
    def formats(self) -> tuple[str, str]:
        """Weight formats of the first projection and of the second."""
        return self.weight_format, self.down_format or self.weight_format

    @property
    def integers(self) -> bool:
        """Whether both projections' weights are integers (``WeightFormat.integers``)."""
        return all(WEIGHT_FORMATS[name].integers for name in self.formats)

    @property
    def rounds_activations(self) -> bool:
        """Whether activations are of eight bits: asked for, and both formats allow it."""
        return self.int8_activations and self.integers


# The fields that a caller gives, in the order of the C++ schemas.
OPTIONS = tuple(option for option in fields(ExpertsSpec) if option.init)
# silu-gated experts in transformers' own layout: Mixtral, Qwen, OLMoE, DeepSeek and most others.
DEFAULT_SPEC = ExpertsSpec()


class ExpertsWeights(NamedTuple):
    """The layer's weights, used where they lie.

    Attributes:
        gate_up: ``[E, 2I, H]``, gate rows first (``[E, I, H]`` when not gated); its last dimension
            as the format stores it.
        down: ``[E, H, I]``, likewise.
        gate_up_bias: ``[E, 2I]`` (or ``[E, I]``) or None.
        down_bias: ``[E, H]`` or None.
        gate_up_scale: as its weight format asks, or None; down_scale: likewise.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None


class TopK(NamedTuple):
    """Which experts each token goes to.

    Attributes:
        ids: ``[T, K]`` int32 or int64; an id outside [0, E) contributes nothing.
        weights: ``[T, K]`` floating point, multiplied in fp32.
    """

    ids: Tensor
    weights: Tensor
