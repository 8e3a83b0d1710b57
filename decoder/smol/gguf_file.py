"""A dense Llama out of a GGUF file: configuration, weights and tokenizer.

All of its weights in fp32, which is what the real model's are made from; a model that is run keeps
the file's blocks (``moesd_kernels.load_gguf``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from decoder.checkpoint.gguf_tokenizer import gguf_tokenizer
from decoder.errors import UserError
from decoder.model.kernels import gguf_dense_weights, gguf_file

_HEAD = "lm_head.weight"


class DenseFile:
    """A GGUF file of architecture ``llama`` with tied embeddings and a byte-level BPE."""

    def __init__(self, file: Path) -> None:
        """Read its header; the weights stay on disk.

        Raises:
            UserError: another architecture or tokenizer than this knows.
            ValueError: a damaged file.
        """
        self._file = gguf_file(file)
        kinds = tuple(
            self._field(key)
            for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
        )
        if kinds != ("llama", "gpt2", "smollm"):
            raise UserError(f"{file} must hold a llama with gpt2's tokens as smollm, got {kinds}")

    def _field(self, name: str) -> Any:
        return self._file.fields[name]

    def config(self) -> dict[str, Any]:
        """transformers' keys, as Llama and its descendants share them."""
        heads = self._field("llama.attention.head_count")
        return {
            "vocab_size": len(self._field("tokenizer.ggml.tokens")),
            "hidden_size": self._field("llama.embedding_length"),
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_hidden_layers": self._field("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._field("llama.attention.head_count_kv"),
            "head_dim": self._field("llama.rope.dimension_count"),
            "max_position_embeddings": self._field("llama.context_length"),
            "rms_norm_eps": self._field("llama.attention.layer_norm_rms_epsilon"),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self._field("llama.rope.freq_base"),
            },
            "tie_word_embeddings": True,
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._field("tokenizer.ggml.padding_token_id"),
        }

    def weights(self) -> dict[str, Tensor]:
        """fp32 weights under transformers' names for a Llama.

        Raises:
            UserError: a head of its own.
            ValueError: a tensor that such a model does not have, or lacks.
        """
        weights = gguf_dense_weights(self._file)
        if _HEAD in weights:
            raise UserError(f"a tied Llama has no tensor {_HEAD}")
        return weights

    def tokenizer(self) -> Any:
        """A fast tokenizer with its chat template."""
        return gguf_tokenizer(self._file)
