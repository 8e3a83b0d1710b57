"""The loop of ``generate`` with decoded tokens in the place of the model.

Rows advance at their own pace; stopping criteria and streamers are called as transformers calls
them, once per token, with the whole batch at one length. So a criterion may be any function of what
it is given, may keep state, and may look at the clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from decoder.errors import UserError

MAX_LENGTH, EOS_TOKEN = "MaxLengthCriteria", "EosTokenCriteria"  # the decoder does these itself


class Lockstep:
    """Tokens of a batch, and how far ``generate`` would have come with them.

    Args:
        input_ids: ``[B, L]`` prompts as given.
        criteria: transformers' ``StoppingCriteriaList``.
        streamer: given to ``generate``, or ``None``; it has got the prompt already.
        pad_id: follows the end of a row.

    Raises:
        UserError: rows can end, and ``pad_id`` is ``None``.
    """

    def __init__(
        self, input_ids: Tensor, criteria: Any, streamer: Any = None, pad_id: int | None = None
    ) -> None:
        rows = input_ids.shape[0]
        self._criteria, self._streamer = criteria, streamer
        self._pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        if self._pads and pad_id is None:
            raise UserError("pad_token_id must be given where an EosTokenCriteria is, got None")
        self._pad = pad_id or 0
        self._tokens: list[list[int]] = [[] for _ in range(rows)]
        self._unfinished = [True] * rows
        self._ids = input_ids.to(torch.int64)
        self._steps = 0
        self.done = False
        own = (*of_kind(criteria, MAX_LENGTH), *of_kind(criteria, EOS_TOKEN))
        self._simple = streamer is None and len(own) == len(criteria)

    def take(self, row: int, token_ids: Sequence[int]) -> None:
        """Add what a row gained."""
        self._tokens[row] += token_ids

    def advance(self) -> list[int]:
        """Call criteria and streamer for every token that all rows have.

        Returns:
            Rows that have ended, whose further tokens do not matter.
        """
        before = self._unfinished
        while not self._simple and not self.done and self._ready():
            step = [
                row[self._steps] if unfinished or not self._pads else self._pad
                for row, unfinished in zip(self._tokens, self._unfinished, strict=True)
            ]
            self._steps += 1
            tokens = torch.tensor(step, dtype=torch.int64, device=self._ids.device)
            self._ids = torch.cat([self._ids, tokens[:, None]], dim=-1)
            stopped = self._criteria(self._ids, None).tolist()
            pairs = zip(self._unfinished, stopped, strict=True)
            self._unfinished = [unfinished and not stop for unfinished, stop in pairs]
            if self._streamer is not None:
                self._streamer.put(tokens.cpu())
            self.done = not any(self._unfinished)
        if not self._pads:
            return []
        changes = enumerate(zip(before, self._unfinished, strict=True))
        return [row for row, (was, is_now) in changes if was and not is_now]

    def end(self) -> Tensor:
        """What ``generate`` returns, ``[B, L + n]`` int64; ends the streamer."""
        if self._streamer is not None:
            self._streamer.end()
        if not self._simple:
            return self._ids
        width = max(map(len, self._tokens))
        rows = [row + [self._pad] * (width - len(row)) for row in self._tokens]
        return torch.cat([self._ids, torch.tensor(rows, device=self._ids.device)], dim=1)

    def _ready(self) -> bool:
        rows = zip(self._tokens, self._unfinished, strict=True)
        return all(
            len(row) > self._steps for row, unfinished in rows if unfinished or not self._pads
        )


def of_kind(criteria: Sequence[Any], name: str) -> list[Any]:
    """Those criteria that are of a class of transformers, and of no class derived from it."""
    module = "transformers.generation.stopping_criteria"
    return [c for c in criteria if (type(c).__module__, type(c).__name__) == (module, name)]
