"""What mixes the positions of a sequence in one layer, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mixer:
    """Attention, a recurrence, or both side by side; vectors (norms, gates, biases) left out.

    Args:
        params: parameters of its matrices and convolutions.
        query_width, kv_width: of attention, see ``LayerSpec``.
        state_width, conv_width: elements that a row keeps of a recurrence: its state, and the last
            inputs of its convolution.
        ring_width: elements to be kept of a token that may yet be rejected, to move both on once it
            is not: what enters the convolution, and what enters the recurrence.
    """

    params: int = 0
    query_width: int = 0
    kv_width: int = 0
    state_width: int = 0
    conv_width: int = 0
    ring_width: int = 0

    def __add__(self, other: Mixer) -> Mixer:
        return Mixer(*(getattr(self, name) + getattr(other, name) for name in Mixer.__slots__))
