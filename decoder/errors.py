"""What the caller gave cannot work: the exception for it, and how other exceptions become one.

The command line turns a ``UserError`` into a single line and exit code 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_LONGEST = 500  # characters of a reason: libraries append stacks and whole lists of names


class UserError(ValueError):
    """Something the caller gave cannot work; the message says what was expected and what came.

    It is one printable line, whatever the names in it hold: a folder may be called anything.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class RequestFailed(RuntimeError):
    """Some requests of a ``generate`` failed while they were decoded; the others are done.

    Attributes:
        outputs: of every request in order (``decoder.Output``), failed ones included.
    """

    def __init__(self, message: str, outputs: Sequence[Any]) -> None:
        super().__init__(message)
        self.outputs = list(outputs)


class RankLost(BaseException):
    """Another process of a run over several is gone, or this one cannot go on with the others.

    As an interrupt, it is not caught where a failure is tried again: every attempt would have to
    begin with all of them.
    """


class UndefinedNumbers(RequestFailed, FloatingPointError):
    """The same, some of them by numbers that define no distribution: NaN, infinities."""


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Whatever fails inside, on something that the caller gave, becomes one line about it.

    Any ``Exception`` is taken: libraries that read files raise every class there is, and some
    define their own below none of Python's. The cause stays chained. A ``UserError`` passes as it
    is, and so does what is no failure: an interrupt, an exit.

    Args:
        what: what could not be done and to what, as in ``"cannot load model 'x'"``.

    Raises:
        UserError: ``"{what}: {reason}"``, printable and on one line.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # A panic in a Rust library derives from BaseException, from a class nobody can import.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What an exception says, with what was added to it on its way; its class as well where the
    message alone says too little."""
    message = str(error).strip()
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if not message or isinstance(error, LookupError):
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    message = "; ".join([message, *getattr(error, "__notes__", ())])
    return message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ..."


def one_line(text: str) -> str:
    """``text`` with white space as single spaces, and escapes for what a terminal would obey."""
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined)
