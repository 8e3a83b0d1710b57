"""One running request on the host: what it has emitted, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decoder.errors import one_line

from .outputs import Output, SequenceStats, TokenLogprob
from .reader import Request


class ActiveSequence:
    """A request in its row: the tokens it has emitted, and when they end it."""

    __slots__ = (
        "_taken",
        "_tokenizer",
        "drafted",
        "error",
        "finish_reason",
        "logprobs",
        "request",
        "row",
        "stats",
        "text_end",
        "token_ids",
    )

    def __init__(self, request: Request, row: int, tokenizer: Any) -> None:
        self.request = request
        self.row = row
        self.token_ids: list[int] = []
        self.drafted: list[bool] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.text_end: int | None = None
        self.stats = SequenceStats(len(request.prompt_ids))
        self._taken = 0
        self._tokenizer = tokenizer

    @property
    def remaining(self) -> int:
        """Tokens it may still emit."""
        return self.request.max_new_tokens - len(self.token_ids)

    def extend(
        self, tokens: Sequence[int], accepted: int, logprobs: Sequence[TokenLogprob] = ()
    ) -> int:
        """Take over a round's tokens up to the one that ends the sequence.

        The cut comes after acceptance and stop conditions beat the length limit, so it cannot
        bias what is emitted. Nothing is changed if this raises, as a tokenizer may.

        Args:
            tokens: emitted this round; the first ``accepted`` were drafts.
            logprobs: of the tokens, when asked for.

        Returns:
            How many were taken; fewer than given when the sequence ended.
        """
        stop_ids, limit = self.request.stop_ids, self.remaining
        taken, reason, text_end = min(len(tokens), limit), None, None
        for i in range(taken):
            if tokens[i] in stop_ids:
                taken = i + 1
                is_stop = tokens[i] in self.request.params.stop_token_ids
                reason = "stop" if is_stop else "eos"
                break
        token_ids = [*self.token_ids, *tokens[:taken]] if self.request.params.stop else []
        found = self._stop_string(token_ids, len(self.token_ids)) if token_ids else None
        if found is not None:
            kept, text_end = found
            taken, reason = kept - len(self.token_ids), "stop"
        if reason is None and taken == limit:
            reason = "length"
        self.token_ids.extend(tokens[:taken])
        self.drafted.extend(i < accepted for i in range(taken))
        self.logprobs.extend(logprobs[:taken])
        self.finish_reason, self.text_end = reason, text_end
        return taken

    def fail(self, reason: str) -> None:
        """End it with an error, said in one line."""
        self.finish_reason, self.error = "error", one_line(f"{self.request.name}: {reason}")

    def take_new(self) -> list[int]:
        """The tokens since this was last asked for."""
        new = self.token_ids[self._taken :]
        self._taken = len(self.token_ids)
        return new

    def output(self) -> Output:
        """The sequence as it stands; the text of one that failed stays empty if it has none."""
        params = self.request.params
        return Output(
            self.request.index,
            self.request.id,
            self.request.prompt,
            self.token_ids,
            self._text(),
            self.finish_reason or "length",
            self.stats,
            self.drafted,
            None if params.logprobs is None else self.logprobs,
            self.error,
            None if params.greedy else params.seed,
        )

    def _text(self) -> str:
        if self._tokenizer is None:
            return ""
        # Some chat models end with a token that their tokenizer does not call special.
        ids = self.token_ids[:-1] if self.finish_reason == "eos" else self.token_ids
        try:
            return self._decode(ids)[: self.text_end]
        except Exception:
            if self.error is None:
                raise
            return ""  # what made it fail may be just this

    def _stop_string(self, token_ids: Sequence[int], first: int) -> tuple[int, int] | None:
        """Number of ``token_ids`` up to the one completing a stop string, and where the text ends.

        Args:
            token_ids: the output with its new tokens, which begin at ``first``.
        """
        stops = self.request.params.stop
        # A character takes at most four bytes and a token at least one, so a stop string that ends
        # in the new tokens begins within this many tokens before them.
        start = max(0, first - 4 * max(map(len, stops)) - 4)
        if not any(stop in self._spelled(token_ids[start:]) for stop in stops):
            return None
        for end in range(first + 1, len(token_ids) + 1):
            if any(stop in self._spelled(token_ids[start:end]) for stop in stops):
                text = self._spelled(token_ids[:end])
                found = [at for at in map(text.find, stops) if at >= 0]
                return (end, self._text_before(token_ids[:end], min(found))) if found else None
        return None

    def _text_before(self, token_ids: Sequence[int], place: int) -> int:
        """The length of the output's text before a place in its spelling."""
        if self._decode(token_ids) == self._spelled(token_ids):
            return place
        whole = len(token_ids)  # tokens that lie before the place, which is near the end
        while len(self._spelled(token_ids[:whole])) > place:
            whole -= 1
        rest = place - len(self._spelled(token_ids[:whole]))
        return len(self._decode(token_ids[:whole])) + rest

    def _spelled(self, token_ids: Sequence[int]) -> str:
        """The text with special tokens, where stop strings are looked for, as transformers does."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)
