"""Tables of lines, one per kind, as HTML that scrolls inside itself."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

Line = dict[str, Any]
OPEN_ROWS = 24  # a table longer than this is folded
LONG = 70  # characters from which a cell may break

# Columns shown per kind of line; anything else stays in the JSON lines.
COLUMNS: dict[str, tuple[str, ...]] = {
    "roofline": ("ceilings",),
    "kernel": (
        *("shape", "dtype", "weight_format", "routing", "backend", "B", "gamma", "T", "distinct"),
        *("gb_per_s", "of_roof", "ratio"),
    ),
    "generate": (
        *("target", "weight_format", "int8_activations", "prompts", "B", "variant", "alpha"),
        *("gamma", "new_tokens", "tokens_per_s", "times_faster_than", "identical_to_ours"),
    ),
    "decode": (
        *("target", "top_k", "batch", "gamma", "alpha", "sigma", "target_efficiency"),
        *("speedup", "speedup_p20_p80", "identical"),
    ),
    "trained": (
        *("target", "drafter", "data", "temperature", "batch", "gamma", "alpha", "sigma"),
        *("target_efficiency", "predicted_target_efficiency", "speedup", "predicted_speedup"),
        *("speedup_p20_p80", "identical"),
    ),
    "compare": (
        *("target", "drafter", "data", "temperature", "verifier", "B", "gamma", "new_tokens"),
        *("identical", "sequences", "ratio", "alpha", "sigma", "target_efficiency"),
    ),
    "auto": (
        *("target", "alpha", "data", "batch", "noise", "against_ar"),
        *("best_fixed", "against_best", "why"),
    ),
    "fit": ("target", "model", "design", "points", "error"),
    "predict": ("top_k", "batch", "gamma", "sigma", "speedup", "predicted"),
    "best-gamma": ("top_k", "batch", "measured", "predicted", "loss"),
    "paper": (
        *("preset", "label", "data", "temperature", "gamma", "batch", "sigma", "paper_sigma"),
        *("speedup", "paper_speedup", "predicted_speedup"),
    ),
    "humaneval": ("ratio", "identical", "sequences", "target_efficiency", "command"),
    "tune": ("shape", "T", "micros", "model_micros"),
    "step": ("target", "B", "queries", "wall_ms", "busy_ms", "kernels"),
}


def tables(lines: Iterable[Line]) -> str:
    """Every known kind that has lines."""
    kinds: dict[str, list[Line]] = {kind: [] for kind in COLUMNS}
    for line in lines:
        if line.get("kind") in kinds:
            # A line of best gammas holds several rows.
            rows = [{**row, "env": line.get("env", {})} for row in line.get("choices", [])]
            kinds[line["kind"]] += rows or [line]
    return "".join(_table(kind, rows) for kind, rows in kinds.items() if rows)


def _table(kind: str, rows: list[Line]) -> str:
    columns = COLUMNS[kind]
    head = "".join(f"<th>{escape(name)}</th>" for name in (*columns, "commit"))
    body = "".join(
        f"<tr>{''.join(_cell(_value(row, name)) for name in (*columns, 'commit'))}</tr>"
        for row in rows
    )
    count = f"{len(rows)} {'row' if len(rows) == 1 else 'rows'}"
    return (
        f"<details{' open' if len(rows) <= OPEN_ROWS else ''}>"
        f"<summary>{escape(kind)} <small>{count}</small></summary>"
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>\n"
    )


def _cell(value: Any) -> str:
    words = escape(text(value))
    return f'<td class="long">{words}</td>' if len(words) > LONG else f"<td>{words}</td>"


def _value(line: Line, name: str) -> Any:
    """A field of the line, or of its environment."""
    return line[name] if name in line else line.get("env", {}).get(name)


def text(value: Any) -> str:
    """A value as a cell shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {text(part)}" for name, part in value.items())
    if isinstance(value, list):
        joint = "; " if value and isinstance(value[0], dict) else ","
        return joint.join(map(text, value))
    return "" if value is None else str(value)
