"""What a model whose matrices lie in a GGUF file's blocks says when it is to be saved."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.base import HfQuantizer


class KeptBlocks(HfQuantizer):
    """The ``hf_quantizer`` of such a model, which ``save_pretrained`` asks.

    Its blocks would be written as a plain model's weights, a folder that nothing loads.
    """

    def __init__(self) -> None:
        """There is no configuration: nothing is quantised."""

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """Refuse."""
        raise NotImplementedError(
            "a model whose GGUF blocks were kept cannot be saved; its file is what it is"
        )

    def is_serializable(self) -> bool:
        """Whether there is more to say than that it cannot be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters may be trained beside it."""
        return False
