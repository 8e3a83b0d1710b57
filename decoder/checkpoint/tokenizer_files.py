"""What must be so of a tokenizer's files before transformers reads them."""

from __future__ import annotations

from pathlib import Path

from decoder.errors import UserError

from .folder import TOKENIZER_CONFIG, inside, read_json, require_content

# The libraries' own names; one of them holds the vocabulary.
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "tiktoken.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder comes with a vocabulary."""
    return any((folder / name).exists() for name in _VOCABULARIES)


def require_tokenizer_files(folder: Path) -> None:
    """Refuse a folder without vocabulary, or one whose tokenizer would read files elsewhere.

    Raises:
        UserError: what is missing, or which file.
    """
    if not has_tokenizer(folder):
        raise UserError(f"{folder} has no tokenizer: expected one of {', '.join(_VOCABULARIES)}")
    for name in _VOCABULARIES:
        if (folder / name).exists():
            require_content(folder / name)
    if not (folder / TOKENIZER_CONFIG).exists():
        return
    file = folder / TOKENIZER_CONFIG
    fields = read_json(file)
    if "fast_tokenizer_files" in fields:
        raise UserError(f"{file}: fast_tokenizer_files is not supported, expected tokenizer.json")
    for key, value in fields.items():
        # Paths of the machine where it was saved are common, lead nowhere and are not read.
        is_path = key.endswith("_file") and isinstance(value, str)
        if is_path and (folder / value).exists() and not inside(folder, folder / value):
            raise UserError(f"{file}: {key} leads out of its folder, to {value!r}")
