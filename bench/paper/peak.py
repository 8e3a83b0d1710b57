"""One of the paper's cells measured over batches: the best, as the paper reports it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.measure.record import Recorder
from bench.runs.cells import group_cells
from bench.runs.decode import measure_batch
from bench.runs.decode_lines import cell_fields
from bench.runs.subject import Subject
from decoder.perf_model.forward_fit import predict_speedup
from decoder.perf_model.observations import Observation

KEPT = ("batch", "sigma", "speedup", "target_efficiency", "identical")


def measure_peak(
    subject: Subject,
    name: str,
    batches: Iterable[int],
    gamma: int,
    *,
    prompt_tokens: int,
    new_tokens: int,
    repetitions: int,
    setup: dict[str, Any],
    recorder: Recorder,
) -> dict[str, Any]:
    """Measure every batch, write its ``decode`` line, and return the one with the best speedup.

    Args:
        name: of the target in the lines.
        setup: what ``describe_subject`` found.

    Returns:
        The best cell's ``KEPT`` fields and ``predicted_speedup``, with nothing fitted.

    Raises:
        ValueError: ``new_tokens`` are too few for a full round.
    """
    lines = []
    for batch in batches:
        pairs = measure_batch(
            subject,
            batch,
            [gamma],
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repetitions=repetitions,
        )
        for pair in pairs:
            lines.append(recorder.write("decode", **cell_fields(name, subject, pair, setup)))
    if not lines:
        raise ValueError(f"no full round in {new_tokens} new tokens: expected more")
    best = max(lines, key=lambda line: line["speedup"])
    predicted = predict_speedup(group_cells(lines)[0].model, Observation.from_json(best))
    return {key: best[key] for key in KEPT} | {"predicted_speedup": predicted}
