"""The page put together: one HTML file that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from bench.measure.fields import whole_lines
from bench.page.headline import Number, headline, processor
from bench.page.questions import Answer, answers
from bench.page.tables import tables
from bench.page.trained import section

FOLDER = Path(__file__).parent


def render(folder: Path) -> str:
    """The page of every line below a folder.

    Raises:
        ValueError: there are none.
    """
    lines = list(whole_lines([folder]))
    if not lines:
        raise ValueError(f"no JSON lines below {folder}")
    measured = [line for line in lines if "env" in line]
    return Template((FOLDER / "page.html").read_text()).substitute(
        style=(FOLDER / "page.css").read_text(),
        title=escape(folder.resolve().name),
        processors=escape("; ".join(dict.fromkeys(map(processor, measured)))),
        commits=escape(", ".join(dict.fromkeys(line["env"]["commit"] for line in measured))),
        numbers="".join(map(_number, headline(lines))),
        trained=section(lines),
        questions="".join(map(_figure, answers(lines))),
        tables=tables(lines),
        commands=_commands(measured),
    )


def _number(number: Number) -> str:
    commands = "".join(map(_command, number.commands))
    return (
        f'<article class="number"><p class="value">{escape(number.value)}</p>'
        f"<p>{escape(number.words)}</p>"
        f"<footer><small>{escape('; '.join(number.processors))}</small>{commands}</footer>"
        "</article>\n"
    )


def _figure(answer: Answer) -> str:
    question = answer.question
    return (
        f"<figure><h3>{escape(question.words)}</h3>"
        f'<div role="img" aria-label="{escape(question.words)}">{answer.picture}</div>'
        f"<figcaption>{escape(question.reading)}</figcaption></figure>\n"
    )


def _command(command: str) -> str:
    """A command that breaks between words only, as far as its words allow."""
    words = (f"<span>{escape(word)}</span>" for word in command.split())
    return f"<code>{' '.join(words)}</code>"


def _commands(lines: Iterable[dict[str, Any]]) -> str:
    commands = dict.fromkeys((x["env"]["commit"], x["env"]["command"]) for x in lines)
    return "".join(
        f"<li><small>{escape(commit)}</small>{_command(command)}</li>"
        for commit, command in commands
    )
