"""Both performance models fitted on some cells and judged on the others; the gamma they choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.measure.record import Recorder, environment
from bench.runs.cells import Cells
from decoder.perf_model.fit_report import ErrorSummary, evaluate
from decoder.perf_model.forward_fit import ForwardFit, fit_forward, predict_speedup, sensitivities
from decoder.perf_model.observations import (
    Observation,
    d_optimal_indices,
    paper_order,
    spread_indices,
    stride_indices,
)
from decoder.perf_model.paper_model import PaperFit, fit_paper, paper_bounds
from decoder.perf_model.profile import Profile

Predict = Callable[[Observation], float]
DESIGNS = ("stride", "spread", "d-optimal")


class Fits:
    """The two fits of one target and their errors on held-out cells."""

    def __init__(self, cells: Cells, chosen: list[int], paper: PaperFit | None) -> None:
        ordered = paper_order(cells.observations)
        self.fitted = [ordered[i] for i in chosen]
        self.held_out = [o for i, o in enumerate(ordered) if i not in set(chosen)]
        self.paper = paper
        self.improved: ForwardFit = fit_forward(cells.model, self.fitted)
        self.zero: Predict = lambda o: predict_speedup(cells.model, o)

    def predictors(self) -> dict[str, Predict]:
        """Model name -> predicted speedup of a cell."""
        named: dict[str, Predict] = {"improved": self.improved.predict, "zero": self.zero}
        return ({"paper": self.paper.predict} if self.paper else {}) | named

    def errors(self) -> dict[str, ErrorSummary]:
        """Relative errors on the cells that no fit saw."""
        return {name: evaluate(p, self.held_out) for name, p in self.predictors().items()}

    def profile(self, cells: Cells) -> Profile:
        """What the controller and the planner load."""
        return Profile.from_fit(
            self.improved,
            held_out=evaluate(self.improved.predict, self.held_out),
            context=max(o.context for o in cells.observations),
            paper=self.paper.model if self.paper else None,
            environment=environment(),
        )

    def warnings(self) -> list[str]:
        """What the lines cannot tell apart, per model, in words."""
        found = [("improved", self.improved.identifiability.warning)]
        if self.paper:
            found.append(("paper", self.paper.identifiability.warning))
        return [f"{model}: {warning}" for model, warning in found if warning]


def fit_cells(cells: Cells, points: int, design: str) -> Fits:
    """Choose ``points`` cells by ``design`` and fit both models on them."""
    ordered = paper_order(cells.observations)
    if design == "stride":
        chosen = stride_indices(len(ordered), points)
    elif design == "spread":
        chosen = spread_indices(ordered, points)
    else:
        chosen = d_optimal_indices(sensitivities(cells.model, ordered), points)
    moe = cells.model.target.moe
    if moe is None:  # the paper's model has no dense form
        return Fits(cells, chosen, None)
    slowest = max((o.reject_time or 0.0) for o in ordered) or cells.model.machine.launch
    machine, target = cells.model.machine, cells.model.target
    paper = fit_paper(
        [ordered[i] for i in chosen],
        paper_bounds(target, cells.model.draft, machine, slowest),
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        ridge_point=machine.ridge_point(cells.model.dtype),
    )
    return Fits(cells, chosen, paper)


def record_errors(
    recorder: Recorder, cells: Cells, fits: Fits, design: str
) -> dict[str, ErrorSummary]:
    """A ``fit`` line for each model's errors on held-out cells, which are returned."""
    errors = fits.errors()
    for model, error in errors.items():
        recorder.write(
            "fit",
            target=cells.model.target.name,
            model=model,
            design=design,
            points=len(fits.fitted),
            error=error.to_json(),
        )
    return errors


class Choice(NamedTuple):
    """The draft length of one (K, B): measured best, predicted best, and what the latter loses.

    ``loss`` is the share of the best measured speedup that following the prediction gives up.
    """

    top_k: int | None
    batch: int
    measured: int
    predicted: int
    loss: float


def best_gammas(
    predict: Callable[[Observation], float], observations: Sequence[Observation]
) -> list[Choice]:
    """The choice at each (K, B) measured with at least three gammas; gamma 0 is always open."""
    groups: dict[tuple[int | None, int], list[Observation]] = {}
    for o in observations:
        if o.speedup is not None:
            groups.setdefault((o.top_k, o.batch), []).append(o)
    choices = []
    for (top_k, batch), cells in groups.items():
        if len(cells) < 3:
            continue
        measured = {0: 1.0} | {o.gamma: o.speedup or 0.0 for o in cells}
        predicted = {0: 1.0} | {o.gamma: predict(o) for o in cells}
        best = max(measured, key=measured.__getitem__)
        chosen = max(predicted, key=predicted.__getitem__)
        loss = 1.0 - measured[chosen] / measured[best]
        choices.append(Choice(top_k, batch, best, chosen, loss))
    return choices
