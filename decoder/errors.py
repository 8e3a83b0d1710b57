"""The one exception that the command line turns into a single line and exit code 2."""

from __future__ import annotations


class UserError(ValueError):
    """Something the caller gave cannot work; the message says what was expected and what came."""
