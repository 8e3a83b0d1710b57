"""What a request asks for: sampling parameters, checked once when they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when the request ends.

    Processing order is transformers': penalties and bias, temperature, top-k, top-p, min-p.

    Attributes:
        temperature: 0 is greedy decoding.
        top_p: keep the smallest set of tokens whose probability reaches it; 1 keeps all.
        top_k: keep the k most probable tokens; 0 keeps all.
        min_p: keep tokens with at least ``min_p`` times the largest probability; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in the
            prompt or output (transformers' rule); 1 does nothing.
        presence_penalty: subtracted once from the logits of tokens in the output.
        frequency_penalty: subtracted per occurrence in the output.
        logit_bias: added to the logits of the given token ids.
        min_new_tokens: end-of-sequence and stop ids are impossible before this many tokens.
        max_new_tokens: length limit of the output.
        seed: of this request; its randomness is a function of (seed, position) alone.
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
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        # JSON gives lists and single strings; the fields are tuples so that params are hashable.
        object.__setattr__(self, "stop", _as_tuple(self.stop, str, "stop"))
        object.__setattr__(
            self, "stop_token_ids", _as_tuple(self.stop_token_ids, int, "stop_token_ids")
        )
        if self.logit_bias is not None:
            bias = {int(token): float(value) for token, value in dict(self.logit_bias).items()}
            object.__setattr__(self, "logit_bias", bias or None)
        for name, expected, ok in self._checks():
            if not ok:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def _checks(self) -> list[tuple[str, str, bool]]:
        number, whole = _is_number, _is_whole
        bias = self.logit_bias or {}
        return [
            ("temperature", "a number >= 0", number(self.temperature) and self.temperature >= 0),
            ("top_p", "in (0, 1]", number(self.top_p) and 0 < self.top_p <= 1),
            ("top_k", "an integer >= 0", whole(self.top_k) and self.top_k >= 0),
            ("min_p", "in [0, 1]", number(self.min_p) and 0 <= self.min_p <= 1),
            (
                "repetition_penalty",
                "a number > 0",
                number(self.repetition_penalty) and self.repetition_penalty > 0,
            ),
            ("presence_penalty", "a finite number", number(self.presence_penalty)),
            ("frequency_penalty", "a finite number", number(self.frequency_penalty)),
            ("logit_bias", "token id >= 0 to a number", all(t >= 0 for t in bias)
             and not any(math.isnan(value) or value == math.inf for value in bias.values())),
            ("min_new_tokens", "an integer >= 0",
             whole(self.min_new_tokens) and self.min_new_tokens >= 0),
            ("max_new_tokens", "an integer >= 1",
             whole(self.max_new_tokens) and self.max_new_tokens >= 1),
            ("seed", "an integer in [0, 2**63)", whole(self.seed) and 0 <= self.seed < 2**63),
            ("stop", "non-empty strings", all(self.stop)),
            ("stop_token_ids", "ids >= 0", all(token >= 0 for token in self.stop_token_ids)),
            ("logprobs", "None or an integer >= 0",
             self.logprobs is None or (whole(self.logprobs) and self.logprobs >= 0)),
        ]  # fmt: skip

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
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ValueError(
                f"unknown sampling parameter {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        return replace(self, **changes)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_tuple(value: Any, kind: type, name: str) -> tuple:
    if value is None:
        return ()
    if isinstance(value, kind):
        return (value,)
    items = tuple(value)
    if not all(isinstance(item, kind) and not isinstance(item, bool) for item in items):
        raise ValueError(f"{name} must be a list of {kind.__name__}, got {value!r}")
    return items
