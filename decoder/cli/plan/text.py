"""A plan for a person: tables, and the answer in words."""

from __future__ import annotations

from rich.table import Table

from decoder.cli.view import Console
from decoder.perf_model.planning.planner import Plan


def print_plan(plan: Plan) -> None:
    """Print it to standard output."""
    console = Console()
    console.print(
        f"[bold]{plan.target}[/bold] with {plan.draft} on {plan.machine}: "
        f"acceptance {plan.alpha:g}, context {plan.context}"
    )
    console.print(_summary_table(plan))
    console.print(_grid(plan, "Speedup over plain decoding", "speedup", 2))
    console.print(_grid(plan, "Target efficiency T(B, 1) / T(B, γ + 1)", "target_efficiency", 2))
    if plan.batches[0].cells[0].collective_share is not None:
        title = "Share of collectives in a verify step of γ + 1 tokens"
        console.print(_grid(plan, title, "collective_share", 2))
    if plan.batches[0].in_memory is not None:
        console.print(_offload_table(plan))
    console.print(_answer(plan))
    error = "unknown" if plan.error is None else f"± {plan.error:.0%} (90 % of held-out points)"
    console.print(f"[bold]How sure:[/bold] {error}; {plan.basis}.")
    for note in plan.notes:
        console.print(f"Note: {note}.")


def _summary_table(plan: Plan) -> Table:
    table = Table(title="Best draft length per batch size")
    for name in ("B", "plain step", "experts", "best γ", "speedup", "tokens/s", "break-even α"):
        table.add_column(name, justify="right")
    for entry in plan.batches:
        best = entry.best
        lowest = [c.break_even_alpha for c in entry.cells if c.gamma and c.break_even_alpha]
        band = "" if plan.error is None else f" ± {best.speedup * plan.error:.2f}"
        table.add_row(
            str(entry.batch),
            f"{entry.ar_seconds * 1e3:.2f} ms",
            "dense" if entry.active_share is None else f"{entry.active_share:.0%}",
            str(best.gamma),
            f"{best.speedup:.2f}x{band if best.gamma else ''}",
            _rate(best.tokens_per_second),
            f"{min(lowest):.2f}" if lowest else "never",
        )
    return table


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _offload_table(plan: Plan) -> Table:
    """At the draft length that is best, or the longest where none is: what reading changes."""
    table = Table(title="Experts brought as needed / all in memory (prediction)")
    for name in ("B", "best γ", "speedup", "γ", "target efficiency", "GB a plain step, verify"):
        table.add_column(name, justify="right")
    for entry in plan.batches:
        whole = entry.in_memory
        assert whole is not None
        index = entry.cells.index(entry.best) or len(entry.cells) - 1
        cell, plain = entry.cells[index], entry.cells[0]
        assert cell.read_bytes is not None and plain.read_bytes is not None
        table.add_row(
            str(entry.batch),
            f"{entry.best.gamma} / {whole.best.gamma}",
            f"{entry.best.speedup:.2f}x / {whole.best.speedup:.2f}x",
            str(cell.gamma),
            f"{cell.target_efficiency:.2f} / {whole.cells[index].target_efficiency:.2f}",
            f"{plain.read_bytes / 1e9:.3g}, {cell.read_bytes / 1e9:.3g}",
        )
    return table


def _grid(plan: Plan, title: str, field: str, digits: int) -> Table:
    table = Table(title=title)
    table.add_column("B", justify="right")
    gammas = [cell.gamma for cell in plan.batches[0].cells if cell.gamma]
    for gamma in gammas:
        table.add_column(f"γ={gamma}", justify="right")
    for entry in plan.batches:
        values = []
        for cell in entry.cells:
            if not cell.gamma:
                continue
            text = f"{getattr(cell, field):.{digits}f}"
            values.append(f"[bold green]{text}[/]" if cell is entry.best else text)
        table.add_row(str(entry.batch), *values)
    return table


def _answer(plan: Plan) -> str:
    if not plan.pays:
        return "[bold]Speculation does not pay[/bold] at any of these batch sizes."
    ranges = ", ".join(f"{low}" if low == high else f"{low} to {high}" for low, high in plan.pays)
    peak = max(plan.batches, key=lambda entry: entry.best.speedup)
    return (
        f"[bold]Speculation pays[/bold] (2 % or more) at B = {ranges}; most at B = {peak.batch} "
        f"with γ = {peak.best.gamma}: {peak.best.speedup:.2f}x."
    )
