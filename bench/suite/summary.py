"""The suite's table: each bar beside its figure, from the folder's lines alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.table import Table

from bench.suite.layers import INVARIANT
from bench.suite.progress import Lines

Line = dict[str, Any]
# What was found, and whether it meets the bar, if there is one; None where nothing was measured.
Figure = tuple[str, bool | None] | None

FEW = 8  # tokens up to which a call is short beside its launches
PEER_TOKENS, GROUPED_TOKENS = 320, 64
SOURCE_PEERS = ("vllm_triton", "vllm_triton_h200")
GROUPED = ("grouped_mm",)
COST_OF_INVARIANCE = 1.05
BATCH, GAMMA = 32, 4  # of the layer's target efficiency


def summary_table(lines: Lines) -> Table:
    """One row per bar: what, bar, figure, whether it is met."""
    dry = any(line["dry_run"] for line in lines.find("start"))
    note = " (dry run: no figure means anything)" if dry else ""
    table = Table(title=f"GPU suite: {_device(lines)}{note}")
    for head in ("what", "bar", "measured", "met"):
        table.add_column(head)
    for what, bar, find in BARS:
        figure = find(lines)
        measured, met = figure if figure else ("not measured", None)
        table.add_row(what, bar, measured, {True: "yes", False: "NO", None: "-"}[met])
    return table


def _device(lines: Lines) -> str:
    names = [line["env"]["device"] for line in lines.find("roofline")]
    return names[-1] if names else "no device was described"


def layers(lines: Lines) -> list[Line]:
    """The layer's lines of the back-end that was chosen; of a point measured twice, the faster."""
    points: dict[tuple[Any, ...], Line] = {}
    for line in lines.find("kernel", backend="auto"):
        key = (*line["shape"], line["B"], line["gamma"])
        if key not in points or line["seconds"]["moesd"]["median"] < _ours(points[key]):
            points[key] = line
    return list(points.values())


def _ours(line: Line) -> float:
    return line["seconds"]["moesd"]["median"]


def _tests(lines: Lines) -> Figure:
    latest = {line["test"]: line["outcome"] for line in lines.find("test")}
    passed, failed = (list(latest.values()).count(x) for x in ("passed", "failed"))
    skipped = len(latest) - passed - failed
    text = f"{passed} passed, {failed} failed, {skipped} skipped"
    return (text, not failed and not skipped) if passed or failed else None


def _over_floor(smallest: int, largest: int, bar: float) -> Callable[[Lines], Figure]:
    """Layer time over bytes / (read or copy rate, the higher), the worst of a range of tokens."""

    def find(lines: Lines) -> Figure:
        ceilings = lines.find("roofline")
        chosen = [x for x in layers(lines) if smallest <= x["T"] <= largest]
        if not ceilings or not chosen:
            return None
        rate = max(ceilings[-1]["ceilings"][name] for name in ("read", "copy"))
        over = {_ours(x) * rate / x["bytes"]: x for x in chosen}
        return f"worst {max(over):.2f}x, {_point(over[max(over)])}", max(over) <= bar

    return find


def _against(peers: Sequence[str], largest: int, bar: float) -> Callable[[Lines], Figure]:
    """How much longer the fastest of some peers takes, the least of up to ``largest`` tokens."""

    def find(lines: Lines) -> Figure:
        ratios, eager = {}, False
        for line in layers(lines):
            peer_ratios = {line["ratio"][name]: name for name in peers if name in line["ratio"]}
            if peer_ratios and line["T"] <= largest:
                ratios[min(peer_ratios)] = line
                eager |= peer_ratios[min(peer_ratios)] in line["not_captured"]
        if not ratios:
            return None
        lowest = min(ratios)
        note = ", some timed eagerly" if eager else ""
        return f"lowest {lowest:.2f}x, {_point(ratios[lowest])}{note}", lowest >= bar

    return find


def _cost_of_invariance(lines: Lines) -> Figure:
    costs = {x["ratio"][INVARIANT]: x for x in layers(lines) if INVARIANT in x["ratio"]}
    if not costs:
        return None
    return f"worst {max(costs):.2f}x, {_point(costs[max(costs)])}", max(costs) <= COST_OF_INVARIANCE


def _layer_efficiency(lines: Lines) -> Figure:
    """Target efficiency of the layer over the roofline's own, the lowest of the shapes."""
    points = {(*x["shape"], x["B"], x["gamma"]): x for x in layers(lines)}
    shares = {}
    for key, verify in points.items():
        step = points.get((*key[:-1], 0))
        if key[-2:] == (BATCH, GAMMA) and step:
            roofline = step["floor_s"] / verify["floor_s"]
            shares[_ours(step) / _ours(verify) / roofline] = verify
    return (f"lowest {min(shares):.3f}", min(shares) >= 0.95) if shares else None


def _speedup(lines: Lines) -> Figure:
    """Speculative over plain decoding at the best batch, at the paper's gamma."""
    cells = {x["speedup"]: x for x in lines.find("decode", gamma=GAMMA)}
    if not cells:
        return None
    best = cells[max(cells)]
    cell = f"{best['target']}, B = {best['batch']}, sigma {best['sigma']:.2f}"
    return f"{best['speedup']:.2f}x, {cell}", best["speedup"] >= 2.0


def _map(lines: Lines) -> Figure:
    fits = lines.find("fit", model="improved")
    cells = len(lines.find("decode"))
    if not fits:
        return (f"{cells} cells, not fitted", False) if cells else None
    median = fits[-1]["error"]["median"]
    return f"{cells} cells, median error {100 * median:.1f} %", median <= 0.05


def _steps(lines: Lines) -> Figure:
    """Kernels and busy share of a replayed forward; told, with no bar of its own."""
    steps = lines.find("step")
    return (_listed(steps), None) if steps else None


def _rounds(lines: Lines) -> Figure:
    """Operations of a round beside its graphs, without a draft and with one."""
    rounds = lines.find("round")
    if not rounds:
        return None
    text = "; ".join(
        f"γ = {x['gamma']}: {x['operations']} operations, {x['kernels']} kernels, "
        f"{x['busy_ms']:.1f} of {x['wall_ms']:.1f} ms"
        for x in rounds
    )
    return text, max(x["operations"] for x in rounds) <= 10


def _listed(steps: Iterable[Line]) -> str:
    return "; ".join(
        f"{x['queries']} rows{_by_modules(x)}: {x['kernels']} kernels, "
        f"{x['busy_ms']:.1f} of {x['wall_ms']:.1f} ms"
        for x in steps
    )


def _by_modules(line: Line) -> str:
    return " by modules" if line.get("attention") == "portable" else ""


def _point(line: Line) -> str:
    return f"{','.join(map(str, line['shape']))} T = {line['T']}"


BARS: tuple[tuple[str, str, Callable[[Lines], Figure]], ...] = (
    ("correctness, invariance, changed routing in a graph", "all pass", _tests),
    ("layer time / (bytes / measured rate), T >= 16", "<= 1.10x", _over_floor(16, 10**9, 1.10)),
    ("layer time / (bytes / measured rate), T <= 8", "<= 1.20x", _over_floor(1, FEW, 1.20)),
    ("grouped_mm / ours, T <= 64", ">= 1.5x", _against(GROUPED, GROUPED_TOKENS, 1.5)),
    ("vLLM's Triton kernel / ours, T <= 320", ">= 1x", _against(SOURCE_PEERS, PEER_TOKENS, 1.0)),
    ("vLLM's Triton kernel / ours, T <= 8", ">= 1.3x", _against(SOURCE_PEERS, FEW, 1.3)),
    ("batch_invariant / ours", "<= 1.05x", _cost_of_invariance),
    ("layer's target efficiency / roofline's, B = 32, γ = 4", ">= 0.95", _layer_efficiency),
    ("speculative / plain, sigma 0.90, γ = 4, best B", ">= 2.0x", _speedup),
    ("B x γ map, model fitted on 21 cells: held-out median error", "<= 5 %", _map),
    ("one replayed forward, B = 8", "-", _steps),
    ("operations beside the graphs of a round, B = 8", "<= 10", _rounds),
)
