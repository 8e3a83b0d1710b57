"""What happens when something raises in a step: it is tried again, then done without.

A step changes a row only where it commits, so whatever failed before that can be repeated. An
interrupt is no failure and is never caught here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from decoder.checkpoint.weights import few
from decoder.errors import reason
from decoder.model.support import broken_weights
from decoder.requests.outputs import UNDEFINED, Output
from decoder.requests.sequence import ActiveSequence

logger = logging.getLogger(__name__)

_WEIGHTS = "the search for broken weights"
T = TypeVar("T")
D = TypeVar("D")


class UndefinedLogits(FloatingPointError):
    """A row's logits define no distribution."""

    def __init__(self) -> None:
        super().__init__(UNDEFINED)


def retried(action: Callable[[], T]) -> T:
    """What ``action`` returns, at a second attempt if the first raises."""
    try:
        return action()
    except Exception as error:
        logger.debug("tried again after %s", reason(error), exc_info=True)
    # Not in the handler: the first attempt's tensors are gone by now, which a second may need.
    return action()


class Tolerance:
    """Calls that a step can do without: what fails twice costs a log line, once, and no request."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def call(self, what: str, action: Callable[[], T], otherwise: D) -> T | D:
        """What ``action`` returns, or ``otherwise``.

        Args:
            what: for the log, such as ``"the drafter's propose"``.
            action: may be repeated.
            otherwise: stands for its result if it fails twice.
        """
        try:
            return retried(action)
        except Exception as error:
            if what not in self._told:
                self._told.add(what)
                logger.warning("%s failed; decoding goes on without: %s", what, reason(error))
                logger.debug("where it failed", exc_info=True)
        return otherwise

    def blame(self, model: Any) -> None:
        """Say once which of a model's weights are no numbers, when logits were none."""
        if _WEIGHTS not in self._told:
            self._told.add(_WEIGHTS)
            names = self.call(_WEIGHTS, lambda: broken_weights(model), [])
            if names:
                logger.warning("weights with NaN or infinities: %s", few(names))


def output_of(sequence: ActiveSequence) -> Output:
    """The output of a sequence that has ended, its own text having made it fail or not."""
    try:
        return retried(sequence.output)
    except Exception as error:
        sequence.fail(reason(error))
        return sequence.output()
