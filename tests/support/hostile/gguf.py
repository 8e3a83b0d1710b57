"""A tiny GGUF file byte by byte, so that each of them can be wrong."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import Any, NamedTuple

U32, F32, BOOL, TEXT, LIST, U64 = 4, 6, 7, 8, 9, 10  # types of values
_CODES = {0: "B", U32: "I", 5: "i", F32: "f", BOOL: "?", U64: "Q"}
ALIGN = 32


class Info(NamedTuple):
    """A tensor as the header has it.

    Attributes:
        shape: innermost first.
        kind: 0 is fp32.
        start: from the data's start on.
    """

    shape: tuple[int, ...]
    kind: int
    start: int


def _tokenizer() -> dict[str, tuple[int, Any]]:
    return {
        "tokenizer.ggml.model": (TEXT, "gpt2"),
        "tokenizer.ggml.pre": (TEXT, "gpt-2"),
        "tokenizer.ggml.tokens": (LIST, (TEXT, ["<s>", "a", "b", "ab", "c", "d", "e", "f"])),
        "tokenizer.ggml.token_type": (LIST, (5, [3, 1, 1, 1, 1, 1, 1, 1])),
        "tokenizer.ggml.merges": (LIST, (TEXT, ["a b"])),
        "tokenizer.ggml.eos_token_id": (U32, 0),
    }


def _fields() -> dict[str, tuple[int, Any]]:
    sizes = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 32,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "rope.dimension_count": 16,
    }
    return {
        "general.architecture": (TEXT, "llama"),
        **{f"llama.{name}": (U32, size) for name, size in sizes.items()},
        "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "llama.rope.freq_base": (F32, 1e4),
        **_tokenizer(),
    }


def _tensors() -> dict[str, Info]:
    shapes = {
        "token_embd": (32, 8),
        "output_norm": (32,),
        **{f"blk.0.{name}_norm": (32,) for name in ("attn", "ffn")},
        **{f"blk.0.attn_{name}": (32, 32) for name in ("q", "output")},
        **{f"blk.0.attn_{name}": (32, 16) for name in ("k", "v")},
        **{f"blk.0.ffn_{name}": (32, 32) for name in ("gate", "up", "down")},
    }
    tensors, start = {}, 0
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = Info(shape, 0, start)
        start += 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
    return tensors


@dataclass
class Gguf:
    """A dense Llama of one layer and a tokenizer; ``bytes()`` is its file.

    Attributes:
        magic: what the file starts with.
        version: of the format.
        counts: of tensors and fields, where they are not as many as there are.
        fields: types and values of metadata; a list is a type and its items.
        tensors: the list of tensors.
    """

    magic: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int | None, int | None] = (None, None)
    fields: dict[str, tuple[int, Any]] = field(default_factory=_fields)
    tensors: dict[str, Info] = field(default_factory=_tensors)

    def header(self) -> bytes:
        """All before the data, padded."""
        tensors, fields = self.counts
        count = len(self.tensors) if tensors is None else tensors
        parts = [
            self.magic,
            struct.pack(
                "<IQQ", self.version, count, len(self.fields) if fields is None else fields
            ),
        ]
        for name, (kind, value) in self.fields.items():
            parts += [text(name), struct.pack("<I", kind), _value(kind, value)]
        for name, info in self.tensors.items():
            dims = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *info.shape)
            parts += [text(name), dims, struct.pack("<IQ", info.kind, info.start)]
        joined = b"".join(parts)
        return joined + b"\0" * (-len(joined) % ALIGN)

    def bytes(self) -> bytes:
        """The file: its data are ones, as fp32."""
        count = sum(math.prod(info.shape) for info in _tensors().values())
        return self.header() + struct.pack("<f", 1.0) * count


def text(value: str | bytes) -> bytes:
    """A text behind its length."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value: Any) -> bytes:
    if isinstance(value, bytes):  # as it is, whatever the type says
        return value
    if kind == TEXT:
        return text(value)
    if kind == LIST:
        of, items = value
        return struct.pack("<IQ", of, len(items)) + b"".join(_value(of, item) for item in items)
    return struct.pack(f"<{_CODES[kind]}", value)
