"""The tokenizer in a GGUF file: its tokens, and llama.cpp's name for how text is split.

transformers can make one as well, but splits by the architecture in place of that name, which is
another model's way for many files, and swaps the tokens that begin and end a text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from decoder.errors import UserError

_KEY = "tokenizer.ggml"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # types of tokens
_LONGEST = 1024  # characters of a piece that is merged from others
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|"
    r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


class _Split(NamedTuple):
    """How a byte-level BPE splits text.

    Attributes:
        digits: a pattern of digits that stay together, in one with words; else GPT-2's pattern.
        alone: whether digits are taken one by one before that pattern.
        composed: whether characters are composed first (NFC).
        whole_words: whether a word that is a token is not merged from pieces.
        begins: whether a text begins with a token of its own where the file does not say.
    """

    digits: str | None = None
    alone: bool = False
    composed: bool = False
    whole_words: bool = False
    begins: bool = False


_LLAMA_3 = _Split(r"\p{N}{1,3}", whole_words=True, begins=True)
_SPLITS = {
    "gpt-2": _Split(),
    "smollm": _Split(alone=True),
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "qwen2": _Split(r"\p{N}", composed=True),
}


def has_gguf_tokenizer(source: Any) -> bool:
    """Whether a file comes with tokens."""
    return source.fields.get(f"{_KEY}.model", "none") != "none"


def gguf_tokenizer(source: Any) -> Any:
    """A fast tokenizer of transformers, with the file's chat template if it has one.

    Args:
        source: an open file (``decoder.model.kernels.gguf_file``).

    Raises:
        UserError: no tokens, or a kind of tokenizer or split that is not read.
        ValueError: metadata of another kind, as the file says it.
    """
    from transformers import PreTrainedTokenizerFast

    if not has_gguf_tokenizer(source):
        raise UserError(f"{source.path} has no tokenizer")
    kind = source.field(f"{_KEY}.model", str)
    if kind not in _MAKERS:
        raise UserError(
            f"{source.path}: the tokenizers that are read are {', '.join(_MAKERS)}, got {kind!r}"
        )
    tokens = _list_of(source, "tokens", str)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if not tokens or len(vocabulary) < len(tokens):
        raise UserError(f"{source.path}: {_KEY}.tokens must differ, got {len(tokens)}")
    types = _list_of(source, "token_type", int, [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise UserError(
            f"{source.path} has {len(tokens)} tokens, and types of {len(types)}: expected as many"
        )
    tokenizer, begins = _MAKERS[kind](source, vocabulary, types)
    _add_whole_tokens(tokenizer, tokens, types)
    named = {f"{ours}_token": _named(source, theirs, tokens) for ours, theirs in _NAMES.items()}
    bos = named["bos_token"]
    if bos is not None and source.field(f"{_KEY}.add_bos_token", bool, begins):
        _begin_with(tokenizer, bos, vocabulary[bos])
    template = "tokenizer.chat_template"
    context = f"{source.field('general.architecture', str)}.context_length"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=source.field(template, str) if template in source.fields else None,
        model_max_length=source.field(context, int),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _list_of(source: Any, name: str, kind: type, default: Any = None) -> list[Any]:
    values: list[Any] = source.field(f"{_KEY}.{name}", list, default)
    if values and type(values[0]) is not kind:  # a list's items are of one type
        got = type(values[0]).__name__
        raise UserError(f"{source.path}: {_KEY}.{name} must hold {kind.__name__}, got {got}")
    return values


def _named(source: Any, name: str, tokens: list[str]) -> str | None:
    key = f"{_KEY}.{name}_token_id"
    if key not in source.fields:
        return None
    index = source.field(key, int)
    if not 0 <= index < len(tokens):
        raise UserError(f"{source.path}: {key} must be below {len(tokens)}, got {index}")
    return tokens[index]


def _byte_level(source: Any, vocabulary: dict[str, int], types: list[int]) -> tuple[Any, bool]:
    """A BPE over bytes, and whether its texts begin with a token."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = source.field(f"{_KEY}.pre", str)
    if name not in _SPLITS:
        raise UserError(
            f"{source.path}: the ways to split text that are read are {', '.join(_SPLITS)}, "
            f"got {name!r}"
        )
    split = _SPLITS[name]
    merges = [tuple(merge.split(" ")) for merge in _list_of(source, "merges", str)]
    if any(len(merge) != 2 for merge in merges):
        raise UserError(f"{source.path}: {_KEY}.merges must be pairs")
    model = models.BPE(vocabulary, merges, ignore_merges=split.whole_words)
    tokenizer = Tokenizer(model)
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.digits is None)
    if split.alone:
        first: Any = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, bytes_of])
    elif split.digits is not None:
        first = pre_tokenizers.Split(Regex(_WORDS.format(digits=split.digits)), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, bytes_of])
    else:
        tokenizer.pre_tokenizer = bytes_of
    if split.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.begins


def _sentencepiece(source: Any, vocabulary: dict[str, int], types: list[int]) -> tuple[Any, bool]:
    """A BPE over characters: the pair of pieces is merged whose union has the highest score."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _list_of(source, "scores", float)
    if len(scores) != len(vocabulary):
        raise UserError(
            f"{source.path} has {len(vocabulary)} tokens, and scores of {len(scores)}: expected "
            "as many"
        )
    pieces = {token: at for token, at in vocabulary.items() if types[at] == _NORMAL}
    if max(map(len, pieces), default=0) > _LONGEST:
        raise UserError(f"{source.path} has a token of more than {_LONGEST} characters")
    pairs = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    pairs.sort(key=lambda pair: (-scores[pieces["".join(pair)]], *map(pieces.__getitem__, pair)))
    unknown = _named(source, "unknown", list(vocabulary))
    model = models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = source.field(f"{_KEY}.add_space_prefix", bool, True)
    spaces = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), *spaces] if prefix else spaces
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer, True


_Maker = Callable[[Any, dict[str, int], list[int]], tuple[Any, bool]]
_MAKERS: dict[str, _Maker] = {"gpt2": _byte_level, "llama": _sentencepiece}


def _add_whole_tokens(tokenizer: Any, tokens: list[str], types: list[int]) -> None:
    """Tokens that are found in a text before it is split."""
    from tokenizers import AddedToken

    def whole(special: bool, *kinds: int) -> list[Any]:
        return [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in kinds and token
        ]

    tokenizer.add_special_tokens(whole(True, _CONTROL, _UNKNOWN))
    tokenizer.add_tokens(whole(False, _USER_DEFINED))


def _begin_with(tokenizer: Any, token: str, index: int) -> None:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B:1"], special_tokens=[(token, index)]
    )
