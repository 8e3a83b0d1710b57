"""What the value of a flag may be: each function reads its text, or says what it expected."""

from __future__ import annotations

import math
import os
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from decoder.cli.files.strict_json import parse_object
from decoder.errors import reason
from decoder.gamma.base import AUTO as GAMMA_AUTO
from decoder.requests.params import shown

# Bounds far above what helps anyone, and far below what brings a machine down.
MAX_BATCH, MAX_GAMMA, MAX_NGRAM, MAX_COUNT = 4096, 4096, 1024, 10**6
_DIGITS = 40  # of a number on a command line


def whole(low: int, high: int) -> Callable[[str], int]:
    """An integer in [low, high]."""

    def read(text: str) -> int:
        value = _int(text)
        if value is None or not low <= value <= high:
            bounds = f">= {low}" if value is None or value < low else f"in [{low}, {high}]"
            raise ArgumentTypeError(f"expected an integer {bounds}, got {shown(text)}")
        return value

    return read


positive = whole(1, MAX_COUNT)


def number(low: float, high: float) -> Callable[[str], float]:
    """A number in [low, high]."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise ArgumentTypeError(f"expected a number in [{low:g}, {high:g}], got {shown(text)}")
        return value

    return read


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """One of these names."""

    def read(text: str) -> str:
        if text not in names:
            raise ArgumentTypeError(f"expected {' or '.join(names)}, got {shown(text)}")
        return text

    return read


def integer(text: str) -> int:
    """An integer whose range is checked later."""
    value = _int(text)
    if value is None:
        raise ArgumentTypeError(f"expected an integer, got {shown(text)}")
    return value


def text(value: str) -> str:
    """Text that a tokenizer takes: a command line may hold bytes that are no UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ArgumentTypeError(f"expected valid Unicode, got {shown(value)}") from None
    return value


def path(value: str) -> str:
    """The name of a file or folder."""
    if not value or "\0" in value:
        raise ArgumentTypeError(f"expected a path, got {shown(value)}")
    return value


def chat_template(value: str) -> str:
    """A Jinja template: itself, or the text of the file with this name."""
    if any(character in value for character in "{}\n"):
        return text(value)
    file = Path(path(value))
    if not file.is_file():
        raise ArgumentTypeError(f"expected a file or a Jinja template, got {shown(value)}")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentTypeError(f"cannot read {shown(value)}: {reason(error)}") from None


def gamma(text: str) -> int | str:
    """A draft length."""
    if text == GAMMA_AUTO:
        return text
    value = _int(text)
    if value is None or value < 0:
        raise ArgumentTypeError(f"expected {GAMMA_AUTO} or an integer >= 0, got {shown(text)}")
    return whole(0, MAX_GAMMA)(text)


def threads(text: str) -> int:
    """Threads that this machine has a use for; PyTorch crashes on many more."""
    return whole(1, max(64, 4 * (os.cpu_count() or 1)))(text)


def device(text: str) -> str:
    """The name of a device that is here."""
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", text)
    if match is None:
        raise ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {shown(text)}")
    if text != "cpu":
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(match[1] or 0) >= count:
            raise ArgumentTypeError(
                f"expected a CUDA device of this machine, which has {count}, got {text!r}"
            )
    return text


def logit_bias(text: str) -> dict[int, float]:
    """``{"token id": bias}``; ranges are checked later."""
    try:
        pairs = parse_object(text).items()
        bias = {integer(token): _bias(value) for token, value in pairs}
    except (ValueError, ArgumentTypeError) as error:
        raise ArgumentTypeError(
            f'expected JSON like {{"17": -1.5}}, got {shown(text)} ({error})'
        ) from None
    if len(bias) < len(pairs):
        raise ArgumentTypeError(f"expected every token once, got {shown(text)}")
    return bias


def _bias(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"a bias must be a number, got {shown(value)}")
    return value


def _int(text: str) -> int | None:
    """Plain digits, and no more of them than anyone means."""
    return int(text) if re.fullmatch(rf"[+-]?[0-9]{{1,{_DIGITS}}}", text.strip()) else None
