"""What a request asks for: sampling parameters, checked once when they are made."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .defaults import generation_fields, model_defaults

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when the request ends.

    Processing order is transformers': penalties and bias, temperature, top-k, top-p, min-p.
    Whole numbers and numbers may be scalars of numpy or torch; they are kept as Python's.

    Attributes:
        temperature: 0 is greedy decoding; otherwise in [1e-20, 1e20]: fp32 logits stay finite.
        top_p: keep the smallest set of tokens whose probability reaches it; 1 keeps all.
        top_k: keep the k most probable tokens; 0 keeps all.
        min_p: keep tokens with at least ``min_p`` times the largest probability; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in the
            prompt or output (transformers' rule); 1 does nothing; in [1e-6, 1e6].
        presence_penalty: subtracted once from the logits of tokens in the output; at most 1e9 in
            size.
        frequency_penalty: subtracted per occurrence in the output; at most 1e9 in size.
        logit_bias: added to the logits of the given token ids; at most 1e9, and -1e9 or less
            makes the token impossible.
        min_new_tokens: end-of-sequence and stop ids are impossible before this many tokens.
        max_new_tokens: length limit of the output.
        seed: of this request; ``None`` draws one from torch's global generator when the request
            is read, and its output reports it. Sampled output is a function of the request and
            this number, whatever else is decoded. One exception: ``gamma="auto"`` chooses draft
            lengths by measured times, and under the ``standard`` and ``block`` verifiers the
            tokens drawn (not their law) depend on how many were drafted. ``coupled`` has no
            exception.
        stop: strings that end the output; the text is cut before the first one.
        stop_token_ids: further ids that end the output like end-of-sequence.
        ignore_eos: do not end at the model's end-of-sequence ids.
        logprobs: number of most probable alternatives to report per token (0: only the chosen
            token's log-probability); ``None`` reports nothing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    min_new_tokens: int = 0
    max_new_tokens: int = 128
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, read in _READERS:
            object.__setattr__(self, name, read(getattr(self, name), name))
        for name, expected, ok in self._checks():
            if not ok:
                raise ValueError(f"{name} must be {expected}, got {shown(getattr(self, name))}")

    def _checks(self) -> list[tuple[str, str, bool]]:
        bias = self.logit_bias or {}
        penalties = self.presence_penalty, self.frequency_penalty
        return [
            ("temperature", "0 or a number in [1e-20, 1e20]",
             self.temperature == 0 or 1e-20 <= self.temperature <= 1e20),
            ("top_p", "in (0, 1]", 0 < self.top_p <= 1),
            ("top_k", "an integer >= 0", self.top_k >= 0),
            ("min_p", "in [0, 1]", 0 <= self.min_p <= 1),
            ("repetition_penalty", "a number in [1e-6, 1e6]",
             1e-6 <= self.repetition_penalty <= 1e6),
            ("presence_penalty", "a number in [-1e9, 1e9]", abs(penalties[0]) <= _LARGEST),
            ("frequency_penalty", "a number in [-1e9, 1e9]", abs(penalties[1]) <= _LARGEST),
            ("logit_bias", "token id >= 0 to a number <= 1e9",
             all(token >= 0 for token in bias) and all(b <= _LARGEST for b in bias.values())),
            ("min_new_tokens", "an integer >= 0", self.min_new_tokens >= 0),
            ("max_new_tokens", "an integer >= 1", self.max_new_tokens >= 1),
            ("seed", "None or an integer in [0, 2**63)",
             self.seed is None or 0 <= self.seed < 2**63),
            ("stop", "non-empty strings", all(self.stop)),
            ("stop_token_ids", "ids >= 0", all(token >= 0 for token in self.stop_token_ids)),
            ("logprobs", "None or an integer >= 0", self.logprobs is None or self.logprobs >= 0),
        ]  # fmt: skip

    @classmethod
    def from_model(cls, model: Any, **changes: Any) -> SamplingParams:
        """What a model's generation config asks for, and ``changes`` to it.

        What it asks for and is not done is logged as a warning.

        Args:
            model: a loaded transformers model.
            changes: fields, instead of the config's.

        Raises:
            ValueError: a value is out of range.
        """
        taken, left_out = model_defaults(generation_fields(model))
        if left_out:
            logger.warning("left out of the model's generation config: %s", shown(left_out))
        return cls(**{**taken, **changes})

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0.0

    def updated(self, changes: Mapping[str, Any]) -> SamplingParams:
        """A copy with some fields changed, as a prompt file's line may ask.

        Raises:
            ValueError: a name is not a sampling parameter, or a value is out of range.
        """
        known = {f.name for f in fields(self)}
        unknown = sorted(set(changes) - known, key=str)
        if unknown:
            raise ValueError(
                f"unknown sampling parameter {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        return replace(self, **changes)


def whole(value: Any) -> int | None:
    """``value`` as an ``int``, also a numpy or torch scalar or 5.0; ``None`` for anything else."""
    if type(value) is int:
        return value
    value = _plain(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def shown(value: Any) -> str:
    """``value`` for a message: on one line, not too long, also where Python refuses to print it."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # thousands of digits
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _plain(value: Any) -> Any:
    """What a scalar of numpy or torch holds; anything else as it is."""
    try:
        return value.item() if hasattr(value, "dtype") else value
    except (ValueError, RuntimeError):  # several elements, or none
        return value


def _read_whole(value: Any, name: str) -> int:
    found = whole(value)
    if found is None:
        raise ValueError(f"{name} must be an integer, got {shown(value)}")
    return found


def _read_whole_or_none(value: Any, name: str) -> int | None:
    return None if value is None else _read_whole(value, name)


def _read_number(value: Any, name: str) -> float:
    found = _plain(value)
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        try:
            if math.isfinite(found):
                return float(found)
        except OverflowError:  # an integer beyond every float
            pass
    raise ValueError(f"{name} must be a finite number, got {shown(value)}")


def _read_flag(value: Any, name: str) -> bool:
    found = _plain(value)
    if not isinstance(found, bool):
        raise ValueError(f"{name} must be true or false, got {shown(value)}")
    return found


def _read_strings(value: Any, name: str) -> tuple[str, ...]:
    """JSON gives lists and single strings; tuples make params hashable."""
    items = (value,) if isinstance(value, str) else _items(value, name, "strings")
    if not all(isinstance(item, str) for item in items):
        raise ValueError(f"{name} must be a list of strings, got {shown(value)}")
    return items


def _read_ids(value: Any, name: str) -> tuple[int, ...]:
    items = (value,) if whole(value) is not None else _items(value, name, "integers")
    ids = tuple(whole(item) for item in items)
    if None in ids:
        raise ValueError(f"{name} must be a list of integers, got {shown(value)}")
    return ids  # type: ignore[return-value]


def _items(value: Any, name: str, kind: str) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be a list of {kind}, got {shown(value)}")
    return tuple(value)


def _read_bias(value: Any, name: str) -> dict[int, float] | None:
    if value is None:
        return None
    bias: dict[int, float] = {}
    try:
        for token, number in dict(value).items():
            # JSON's keys are strings.
            key = int(token) if isinstance(token, str) else whole(token)
            number = _plain(number)
            if key is None or key in bias or isinstance(number, (bool, str)) or math.isnan(number):
                raise ValueError
            bias[key] = float(number) if number > -_LARGEST else -math.inf
    except (ValueError, TypeError, OverflowError):
        raise ValueError(
            f"{name} must be token ids to numbers, each id once, got {shown(value)}"
        ) from None
    return bias or None


_SHOWN = 80  # characters of a value in a message
_LARGEST = 1e9  # of what is added to logits: far beyond them, far from fp32's end

_READERS: tuple[tuple[str, Callable[[Any, str], Any]], ...] = (
    ("temperature", _read_number),
    ("top_p", _read_number),
    ("top_k", _read_whole),
    ("min_p", _read_number),
    ("repetition_penalty", _read_number),
    ("presence_penalty", _read_number),
    ("frequency_penalty", _read_number),
    ("logit_bias", _read_bias),
    ("min_new_tokens", _read_whole),
    ("max_new_tokens", _read_whole),
    ("seed", _read_whole_or_none),
    ("stop", _read_strings),
    ("stop_token_ids", _read_ids),
    ("ignore_eos", _read_flag),
    ("logprobs", _read_whole_or_none),
)
