"""Named MoE layer shapes of published models, and the ``E,K,H,I`` spelling for any other."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """One MoE layer: experts, experts per token, hidden size, expert intermediate size."""

    E: int
    K: int
    H: int
    I: int

    def __str__(self) -> str:
        return ",".join(map(str, self))

    def expert_bytes(self, weight_bytes: float) -> int:
        """Bytes of one gated expert: gate, up and down."""
        return round(3 * self.H * self.I * weight_bytes)

    def operations(self, tokens: int) -> int:
        """Floating-point operations of ``tokens`` tokens, all K experts each."""
        return 6 * tokens * self.K * self.H * self.I


SHAPES = {
    "olmoe": Shape(64, 8, 2048, 1024),
    "qwen2-57b": Shape(64, 8, 3584, 2560),
    "qwen3-30b": Shape(128, 8, 2048, 768),
    "mixtral": Shape(8, 2, 4096, 14336),
    "deepseek-v3": Shape(256, 8, 7168, 2048),
    # What two CPU cores can hold and measure in minutes; the acceptance shapes of the CPU kernels.
    "cpu-64": Shape(64, 4, 1024, 704),
    "cpu-32": Shape(32, 4, 1024, 1408),
    "cpu-mixtral": Shape(8, 2, 2048, 3584),
    "embedded": Shape(32, 4, 256, 48),
}
CPU_SHAPES = ("cpu-64", "cpu-32", "olmoe", "cpu-mixtral")


def parse_shape(text: str) -> Shape:
    """``"olmoe"`` or ``"64,8,2048,1024"`` -> Shape.

    Raises:
        ValueError: neither a known name nor four positive integers with K <= E.
    """
    if text in SHAPES:
        return SHAPES[text]
    try:
        shape = Shape(*(int(part) for part in text.split(",")))
    except (TypeError, ValueError):
        names = ", ".join(SHAPES)
        raise ValueError(f"shape must be E,K,H,I or one of {names}; got {text!r}") from None
    if min(shape) < 1 or shape.K > shape.E:
        raise ValueError(f"shape needs positive E,K,H,I with K <= E, got {text!r}")
    return shape
