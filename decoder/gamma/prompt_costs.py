"""What a drafter spends on prompts, as a part of what a drafted token costs."""

from __future__ import annotations

from collections import deque

_TIMED = 4  # groups of requests whose prompts' cost to the drafter is remembered
_ADMITTED = 16  # groups whose lengths are


class PromptCosts:
    """Seconds for prompts that drafting costs more than plain decoding, per token of output.

    A drafter that may put prompts off while plain decoding goes on saves their time. What it
    spends more when it drafts is a cost of drafting, and weighs most where outputs are short.

    What a token of a prompt costs is known from groups that were admitted while drafts were made;
    how many there are to one of output, from the latest groups. Those are seen without drafts as
    well, so prompts that did not repay a drafter speak no longer than they come.
    """

    def __init__(self) -> None:
        # Seconds per token of a prompt, apart by whether plain decoding was asked for.
        self._rates = {plain: deque[float](maxlen=_TIMED) for plain in (True, False)}
        self._lengths = deque[tuple[float, float]](maxlen=_ADMITTED)  # of prompts, of outputs

    def add(self, plain: bool, prompts: float, outputs: float, seconds: float) -> None:
        """Record a group of requests.

        Args:
            plain: whether plain decoding was asked for.
            prompts: tokens of their prompts.
            outputs: that they are expected to emit.
            seconds: that the drafter spent on the prompts.
        """
        self._rates[plain].append(seconds / max(prompts, 1.0))
        self._lengths.append((prompts, outputs))

    def per_token(self) -> float:
        """Seconds per token of output."""
        # The least of few: stalls only slow down, and of a short prompt each token costs more.
        plain, drafting = (min(self._rates[key], default=0.0) for key in (True, False))
        prompts = sum(prompt for prompt, _ in self._lengths)
        outputs = sum(output for _, output in self._lengths)
        return max(drafting - plain, 0.0) * prompts / max(outputs, 1.0)
