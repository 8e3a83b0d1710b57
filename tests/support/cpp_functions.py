"""How long the functions of a C++ source are, by counting braces at namespace and class scope."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Comments, strings, raw strings and characters hold braces that mean nothing.
_OPAQUE = re.compile(
    r'//[^\n]*|/\*.*?\*/|R"(?P<mark>\w*)\(.*?\)(?P=mark)"|"(?:\\.|[^"\\\n])*"'
    r"|(?<!\w)'(?:\\.|[^'\\])+'",
    re.DOTALL,
)
_DIRECTIVE = re.compile(r"^[ \t]*#(?:\\\n|[^\n])*", re.MULTILINE)
_ATTRIBUTE = re.compile(
    r"\[\[.*?\]\]|__attribute__\s*\(\(.*?\)\)|(?:__launch_bounds__|alignas)\s*\(.*?\)"
)
_SCOPE = re.compile(r"(?:\w+ )*?(?:namespace|class|struct|union|enum|extern)\b(?!.*\))", re.DOTALL)
_NAME = re.compile(r"(operator\s*(?:\(\)|[^\s(]+)|[\w:~]+)\s*\(")
_MEMBER_VALUE = re.compile(r"\)[^(){};]*:(?!:).*\w\s*$", re.DOTALL)  # `: x_` before `{x}`


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Name and number of lines, declaration included, of each function that is not in another.

    What opens a brace outside of any function is a function if its head has parentheses and it
    is neither a namespace, a type nor an initializer.
    """
    text = _blank(_DIRECTIVE, _blank(_OPAQUE, source))
    open_braces: list[tuple[str, int] | None] = []  # name and first character of each function
    head = 0
    for match in re.finditer(r"[{};]", text):
        inside = any(open_braces)
        if match.group() == "{":
            before = text[head : match.start()]
            if not inside and _MEMBER_VALUE.search(before):
                open_braces.append(("", head))
                continue
            name = None if inside else _function_name(before)
            start = match.start() - len(before.lstrip())
            open_braces.append(None if name is None else (name, start))
        elif match.group() == "}" and open_braces:
            function = open_braces.pop()
            if function and not function[0]:
                continue  # the head of a constructor goes on
            if function:
                yield function[0], text.count("\n", function[1], match.start()) + 1
        head = match.end() if not any(f and not f[0] for f in open_braces) else head


def _blank(pattern: re.Pattern[str], text: str) -> str:
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


def _function_name(head: str) -> str | None:
    """The name that a head declares a function by, or None where it is something else's."""
    head = _without_template(_ATTRIBUTE.sub("", head).strip())
    found = _NAME.search(head)
    if found is None or _SCOPE.match(head) or "=" in head[: found.start()]:
        return None
    return "".join(found.group(1).split())


def _without_template(head: str) -> str:
    """The head behind its ``template <…>``, whose brackets may be nested."""
    if not re.match(r"template\s*<", head):
        return head
    depth = 0
    for bracket in re.finditer(r"[<>]", head):
        depth += 1 if bracket.group() == "<" else -1
        if depth == 0:
            return _without_template(head[bracket.end() :].lstrip())
    return head
