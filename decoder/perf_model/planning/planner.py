"""Where speculation pays: predicted times over (batch, gamma) turned into an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from decoder.perf_model import theory
from decoder.perf_model.forward_model import ForwardModel
from decoder.perf_model.profile import Profile

from .notes import basis, notes_on

# Far beyond what anyone runs; a cell takes milliseconds.
_MAX_BATCH, _MAX_GAMMA, _MAX_CELLS = 2**20, 1024, 4096
_MARGIN = 1.02  # speculation "pays" from 2 % on: less is noise in any run


@dataclass(frozen=True, slots=True)
class Cell:
    """One (batch, gamma): what the model predicts.

    Args:
        break_even_alpha: None where no acceptance rate is enough.
        collective_share: of the verify forward; None without ranks.
        read_bytes: of experts that the verify forward brings, of the plain step at gamma 0; None
            where all are in memory.
    """

    batch: int
    gamma: int
    target_efficiency: float
    speedup: float
    tokens_per_second: float
    break_even_alpha: float | None
    collective_share: float | None = None
    read_bytes: float | None = None


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The cells of one batch size and the best of them (gamma 0 is plain decoding).

    Args:
        active_share: of experts, in a plain step; None for a dense model.
        in_memory: the same with all experts in memory, where they are offloaded.
    """

    batch: int
    ar_seconds: float
    active_share: float | None
    cells: tuple[Cell, ...]
    in_memory: BatchPlan | None = None

    @property
    def best(self) -> Cell:
        """The fastest gamma."""
        return max(self.cells, key=lambda cell: cell.speedup)

    @property
    def pays(self) -> bool:
        """Whether some gamma gains 2 % or more."""
        return self.best.speedup >= _MARGIN


@dataclass(frozen=True, slots=True)
class Plan:
    """Predictions over a grid, with what stands behind them.

    Args:
        pays: runs of batch sizes (first, last) among those asked in which some gamma gains 2 %.
        error: relative error of speedup to expect, or None where nothing was measured.
        basis: one sentence on where the numbers come from.
    """

    target: str
    draft: str
    machine: str
    alpha: float
    context: int
    batches: tuple[BatchPlan, ...]
    pays: tuple[tuple[int, int], ...]
    error: float | None
    basis: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict, the best gamma of each batch included."""
        data = asdict(self)
        for entry, plan in zip(data["batches"], self.batches, strict=True):
            entry["best_gamma"] = plan.best.gamma
            entry["best_speedup"] = plan.best.speedup
            if plan.in_memory is not None:
                entry["in_memory"]["best_gamma"] = plan.in_memory.best.gamma
                entry["in_memory"]["best_speedup"] = plan.in_memory.best.speedup
        return data


def make_plan(
    model: ForwardModel,
    *,
    alpha: float,
    batches: Sequence[int],
    gammas: Sequence[int],
    context: int,
    profile: Profile | None = None,
) -> Plan:
    """Predict every (batch, gamma) at a given acceptance rate.

    Args:
        gammas: draft lengths; 0 (plain decoding) is always included.
        profile: the fit behind ``model``, for its error.

    Raises:
        ValueError: an empty grid or one too large, or a number out of range.
    """
    _check_grid(batches, gammas)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    ordered = sorted({0, *gammas})
    plans = tuple(
        _plan_batch(model, batch, ordered, alpha, context) for batch in sorted(set(batches))
    )
    return Plan(
        target=model.target.name,
        draft=model.draft.name if model.draft else "none (drafting costs nothing)",
        machine=_machine(model),
        alpha=alpha,
        context=context,
        batches=plans,
        pays=_paying_ranges(plans),
        error=_error(profile),
        basis=basis(model, profile),
        notes=tuple(
            notes_on(model, [entry.batch for entry in plans], ordered[-1], context, profile)
        ),
    )


def _check_grid(batches: Sequence[int], gammas: Sequence[int]) -> None:
    for name, values, low, high in (
        ("batch sizes", batches, 1, _MAX_BATCH),
        ("gammas", gammas, 0, _MAX_GAMMA),
    ):
        if not values:
            raise ValueError(f"{name} must be at least one, got none")
        wrong = [value for value in (min(values), max(values)) if not low <= value <= high]
        if wrong:
            raise ValueError(f"{name} must be at least {low} and at most {high}, got {wrong[0]}")
    if not any(gammas):
        raise ValueError("gammas must have one that drafts, got 0 alone")
    if len(batches) * len(gammas) > _MAX_CELLS:
        raise ValueError(
            f"batch sizes times gammas must be at most {_MAX_CELLS} cells, got "
            f"{len(batches)} x {len(gammas)}"
        )


def _plan_batch(
    model: ForwardModel, batch: int, gammas: Sequence[int], alpha: float, context: int
) -> BatchPlan:
    step = model.round_cost(batch, 0, context)
    share = _collective_share(model, batch, 0, context)
    read = _read_bytes(model, batch, 0)
    cells = [Cell(batch, 0, 1.0, 1.0, batch / step, 0.0, share, read)]
    for gamma in gammas:
        if gamma == 0:
            continue
        times = model.round_times(batch, gamma, context)
        needed = times.round(gamma) / step
        speedup = float(theory.expected_tokens(alpha, gamma)) / needed
        threshold = float(theory.break_even_alpha(gamma, max(needed, 1.0)))
        cells.append(
            Cell(
                batch=batch,
                gamma=gamma,
                target_efficiency=times.ar / times.verify,
                speedup=speedup,
                tokens_per_second=speedup * batch / step,
                break_even_alpha=None if threshold != threshold else threshold,
                collective_share=_collective_share(model, batch, gamma, context),
                read_bytes=_read_bytes(model, batch, gamma),
            )
        )
    moe = model.target.moe
    share = None
    if moe is not None:
        active = model.activation(batch, 1, moe.num_experts, moe.top_k)
        share = float(active) / moe.num_experts
    in_memory = None
    if model.offload is not None:
        in_memory = _plan_batch(replace(model, offload=None), batch, gammas, alpha, context)
    return BatchPlan(batch, step, share, tuple(cells), in_memory)


def _read_bytes(model: ForwardModel, batch: int, gamma: int) -> float | None:
    return None if model.offload is None else model.read_bytes(batch, gamma)


def _collective_share(model: ForwardModel, batch: int, gamma: int, context: int) -> float | None:
    if model.ranks is None:
        return None
    times = model.rank_times(batch, gamma, context)
    return times.collective / times.forward


def _paying_ranges(plans: Sequence[BatchPlan]) -> tuple[tuple[int, int], ...]:
    ranges: list[tuple[int, int]] = []
    inside = False
    for plan in plans:
        if not plan.pays:
            inside = False
        elif inside:
            ranges[-1] = (ranges[-1][0], plan.batch)
        else:
            ranges.append((plan.batch, plan.batch))
            inside = True
    return tuple(ranges)


def _machine(model: ForwardModel) -> str:
    name = model.machine.name
    if model.offload is not None:
        return f"{name}, experts brought as needed (prediction)"
    return name if model.ranks is None else f"{model.ranks.count} ranks of {name} (prediction)"


def _error(profile: Profile | None) -> float | None:
    return profile.held_out.p90 if profile is not None and profile.held_out else None
