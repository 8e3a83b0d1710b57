"""A trained pair on the paper's grid: data sets, temperatures, batches and draft lengths.

A cell is a ``trained`` line, with everything a ``decode`` line has. Lines that a file holds already
are not measured again, so a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.measure.ceilings import CeilingProbe
from bench.measure.record import Recorder, end_with_a_whole_line, read_lines
from bench.paper.identity import file_identity, pair_identity
from bench.runs.cells import TRAINED, group_cells
from bench.runs.decode import measure_batch
from bench.runs.decode_lines import cell_fields, describe_subject, memory_speed
from bench.runs.subject import Subject
from bench.workloads.prompts import prompt_tokens, prompts_file
from bench.workloads.trained import TrainedPair
from decoder.perf_model.forward_fit import predict_speedup
from decoder.sampling.sampler import VerifierName

SETUP = ("target_spec", "draft_spec", "machine", "model_dtype", "machine_read_bandwidth")

Line = dict[str, Any]
Place = tuple[str, int, int]  # data set, temperature, batch


@dataclass(frozen=True, slots=True)
class Grid:
    """Which cells, and how each is measured.

    Attributes:
        datasets: by the paper's names.
        verifier: at temperatures above 0.
        new_tokens: of each row; an end of sequence does not end it, so that rows stay live.
        repetitions: each with other prompts.
        prompts: folder of the data sets' files.
    """

    datasets: Sequence[str]
    temperatures: Sequence[int]
    batches: Sequence[int]
    gammas: Sequence[int]
    verifier: VerifierName
    new_tokens: int
    repetitions: int
    prompts: Path


def measure_grid(
    pair: TrainedPair, grid: Grid, recorder: Recorder, dtype: torch.dtype, device: str
) -> list[Line]:
    """Measure the cells that the recorder's file lacks, a line each as it is done.

    Returns:
        The lines of the whole grid, found and measured.
    """
    same = _run_fields(pair, grid, dtype)
    files = {x: file_identity(prompts_file(x, grid.prompts)) for x in grid.datasets}
    found = _found(recorder, same, grid, files)
    missing = _missing(grid, found)
    if not missing:
        return found
    tokenizer = pair.load_tokenizer()
    prompts = {name: prompt_tokens(tokenizer, name, grid.prompts) for name in grid.datasets}
    target = pair.load_target(dtype, device)
    draft = pair.load_draft(target)
    probe = CeilingProbe(dtype) if torch.device(device).type == "cpu" else None
    # One description for all cells: the performance model is of one machine.
    described = found[0] if found else describe_subject(Subject(target, draft, None), device, probe)
    setup = {name: described[name] for name in SETUP if name in described}
    for (data, temperature, batch), gammas in tqdm(missing.items(), desc=pair.name, disable=None):
        subject = Subject(target, draft, None, temperature, prompts[data], grid.verifier)
        pairs = measure_batch(
            subject,
            batch,
            gammas,
            prompt_tokens=0,
            new_tokens=grid.new_tokens,
            repetitions=grid.repetitions,
            read=probe.read if probe else None,
        )
        for cell in pairs:
            fields = cell_fields(pair.name, subject, cell, setup) | memory_speed(cell, setup)
            place = {"data": data, "temperature": temperature, "prompts": files[data]}
            line = same | place | fields
            found.append(recorder.write(TRAINED, **line, **_predicted(line)))
    return found


def _run_fields(pair: TrainedPair, grid: Grid, dtype: torch.dtype) -> Line:
    """What the lines of one run have in common."""
    return {
        "target": pair.name,
        "drafter": pair.drafter,
        **pair_identity(pair),
        "verifier": grid.verifier,
        "new_tokens": grid.new_tokens,
        "repetitions": grid.repetitions,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _found(
    recorder: Recorder, same: Line, grid: Grid, files: Mapping[str, str | None]
) -> list[Line]:
    """The grid's lines that the file holds, measured alike on this device.

    Args:
        files: digest of each data set's file. Prompts of which none is known, of an older line or
            of a file that is not at hand, are taken for the same.
    """
    if recorder.path is None or not recorder.path.exists():
        return []
    end_with_a_whole_line(recorder.path)
    return [
        line
        for line in read_lines([recorder.path], TRAINED)
        if all(line.get(name) == value for name, value in same.items())
        and line["env"]["device"] == recorder.environment["device"]
        and line["gamma"] in grid.gammas
        and (line["data"], line["temperature"], line["batch"]) in _places(grid)
        and len({line.get("prompts"), files[line["data"]]} - {None}) < 2
    ]


def _places(grid: Grid) -> list[Place]:
    return list(product(grid.datasets, grid.temperatures, grid.batches))


def _missing(grid: Grid, found: Sequence[Line]) -> dict[Place, list[int]]:
    """Places with draft lengths that have no line."""
    done = {(x["data"], x["temperature"], x["batch"], x["gamma"]) for x in found}
    gammas = {place: [g for g in grid.gammas if (*place, g) not in done] for place in _places(grid)}
    return {place: left for place, left in gammas.items() if left}


def _predicted(line: Line) -> dict[str, float]:
    """What the performance model says of a cell at its sigma, with nothing fitted."""
    (cells,) = group_cells([line])
    (cell,) = cells.observations
    model = cells.model.with_top_k(cell.top_k).at_memory_speed(cell.memory_speed)
    return {
        "predicted_speedup": predict_speedup(cells.model, cell),
        "predicted_target_efficiency": model.target_efficiency(
            cell.batch, cell.gamma, cell.context
        ),
    }
