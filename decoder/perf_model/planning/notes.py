"""What to know about a plan's numbers: where they come from, and what they leave out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from decoder.perf_model import theory
from decoder.perf_model.forward_model import ForwardModel
from decoder.perf_model.profile import Profile

# Checked by the planner's tests: zero-measurement predictions against the 60 peaks of the paper's
# Tables 1-2. Its engine spent more on drafting than a machine must.
ZERO_MEASUREMENT_MEDIAN = 0.48


def basis(model: ForwardModel, profile: Profile | None) -> str:
    """One sentence on where the numbers come from."""
    if model.ranks is not None:
        alone = basis(replace(model, ranks=None), profile)
        return f"a prediction: no run over ranks stands behind it. One rank is {alone}"
    if model.offload is not None:
        whole = basis(replace(model, offload=None), profile)
        return (
            "a prediction: experts are taken to be routed to uniformly, by each step independently "
            f"of the one before. Of the model in memory: {whole}"
        )
    if profile is None:
        return (
            f"zero-measurement: machine rates alone ({model.machine.source or 'given'}); no run of "
            f"this model stands behind it. It assumes an engine without overhead: against the 60 "
            f"peaks of the MoESD paper such predictions are {ZERO_MEASUREMENT_MEDIAN:.0%} too high "
            "in the median"
        )
    if profile.held_out is None:
        return f"fitted to {profile.points} measured points; no held-out points, error unknown"
    held = profile.held_out
    return (
        f"fitted to {profile.points} measured points; on {held.count} held-out points the error of "
        f"the speedup was {held.median:.1%} in the median, {held.p90:.1%} at the 90th percentile"
    )


def notes_on(
    model: ForwardModel, batches: Sequence[int], gamma: int, context: int, profile: Profile | None
) -> list[str]:
    """What a reader of the grid should know, a sentence each without its full stop.

    Args:
        batches: of the grid, ascending.
        gamma: the largest of the grid.
        profile: the fit behind ``model``, if any.
    """
    notes = [*_rank_notes(model, batches[-1]), *_offload_notes(model)]
    moe = model.target.moe
    if moe is not None:
        threshold = theory.full_activation_threshold(moe.num_experts, moe.top_k)
        notes.append(
            f"{moe.num_experts} experts, {moe.top_k} per token: {threshold} independent tokens "
            "activate 95 % of them; below that, verification loads more experts than a plain step"
        )
    notes.extend(_memory_notes(model, batches[-1], gamma, context))
    if profile is not None:
        notes.extend(profile.warnings)
        if abs(context - profile.context) > max(256, profile.context):
            notes.append(f"fitted at a context of {profile.context}, asked for {context}")
    if moe is not None and len(batches) == 1:
        notes.append("one batch size only: the inverted U over B cannot show")
    return notes


def _memory_notes(model: ForwardModel, batch: int, gamma: int, context: int) -> list[str]:
    target, memory = model.target, model.machine.memory_bytes
    notes = []
    recurrent = target.recurrent_bytes(gamma + 1)
    if recurrent:
        notes.append(
            f"recurrent layers keep {recurrent / 1e6:.3g} MB of each sequence at any context: a "
            f"state and the inputs of {gamma + 1} tokens, read and written in every step"
        )
    shares = 1 if model.ranks is None else model.ranks.count
    weights = target.weight_bytes_per_rank(shares)
    if model.offload is not None:
        weights += model.offload.budget - model.offload.total_bytes
    weights += model.draft.weight_bytes if model.draft else 0.0
    row = target.kv_cache_bytes(context) + recurrent
    local = batch if model.ranks is None else model.ranks.local(batch)
    if memory and weights > memory:
        notes.append(
            f"weights of {weights / 1e9:.0f} GB do not fit the {memory / 1e9:.0f} GB of "
            f"{model.machine.name}: the numbers are for one with its rates and enough memory"
        )
    elif memory and row and (memory - weights) / row < local:
        where = " on a rank" if shares > 1 else ""
        fits = int((memory - weights) / row)
        notes.append(f"caches of {context} tokens fit for about {fits} sequences{where}")
    return notes


def _offload_notes(model: ForwardModel) -> list[str]:
    offload = model.offload
    if offload is None:
        return []
    how = (
        "a layer waits for those it misses; some are read while the layer before it computes, "
        "where steps use nine of ten"
        if offload.prefetches
        else "a layer waits for those it misses, and none are copied ahead"
    )
    notes = [
        f"memory for {offload.places} of {sum(offload.counts)} experts of "
        f"{offload.expert_bytes / 1e6:.3g} MB; each distinct one is brought once per forward, at "
        f"{offload.bandwidth / 1e9:g} GB/s: {how}"
    ]
    if model.target.expert_bytes < 2:
        notes.append("the decoder offloads experts of 16 and 32 bits, none that are quantised")
    return notes


def _rank_notes(model: ForwardModel, batch: int) -> list[str]:
    ranks, moe = model.ranks, model.target.moe
    if ranks is None or moe is None:
        return []
    replicated = "attention is replicated (every rank computes it for all of B), and each MoE "
    how = {
        "all-reduce": f"{replicated}layer's outputs are summed by an all-reduce",
        "all-gather": f"{replicated}layer's outputs are gathered by every rank, which sums them",
        "all-to-all": "attention is data-parallel (each rank computes it for its share of B), and "
        "each MoE layer's rows travel to their experts and back",
    }
    _, rows = model.expert_load(moe, batch, 1)
    mean = batch * moe.top_k / ranks.count
    return [
        f"{ranks.held(moe.num_experts)} of {moe.num_experts} experts per layer and all other "
        f"weights on each of {ranks.count} ranks; {how[ranks.exchange]} over {ranks.network.name}, "
        f"{ranks.network.bandwidth / 1e9:g} GB/s and {ranks.network.latency * 1e6:g} µs a message",
        f"a plain step at B = {batch} gives the busiest rank {rows / mean:.2f} times the "
        "mean rows, experts being equally popular; all ranks wait for it, and collectives overlap "
        "with nothing",
    ]
