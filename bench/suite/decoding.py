"""The decoder's pieces: a profiled step, the B x gamma map, the model fitted on 21 cells of it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.measure.telemetry import OperationCount
from bench.runs.cells import load_cells, setup_fields
from bench.runs.decode import measure_batch
from bench.runs.decode_lines import cell_fields
from bench.runs.fitting import fit_cells, record_errors
from bench.runs.subject import Subject, drafter_for
from bench.suite.progress import FILE
from bench.suite.session import OutOfTimeError, Session
from bench.suite.sizes import DRAFT, fitting_preset
from bench.tuning.compiling import Job
from bench.workloads.models import random_model
from bench.workloads.prompts import random_prompts
from bench.workloads.scaling import scaled_config
from bench.workloads.shapes import Shape
from decoder import SamplingParams, SpeculativeDecoder
from decoder.model.kernels import AttentionName
from decoder.model.runner import ModelRunner
from decoder.perf_model.config_spec import spec_from_config
from decoder.perf_model.hardware.machine import Machine
from decoder.perf_model.presets import preset_spec
from decoder.perf_model.theory import alpha_from_sigma
from moesd_kernels import accelerate

# The paper's best sigma at this gamma; acceptance is imposed by replay.
SIGMA, SIGMA_GAMMA = 0.90, 4
CELL_S = 8.0
PROFILED_ROWS = (1, 5)
FORMS: tuple[AttentionName, ...] = ("auto", "portable")
PROFILED_BATCH, PROFILED_PROMPT = 8, 32
PROFILED_GAMMAS = (0, SIGMA_GAMMA)
TOP_KERNELS = 25
DESIGN = "d-optimal"


def subject(session: Session) -> tuple[str, Subject, dict[str, Any]]:
    """The target that fits, with a draft of its own cost, its name, and what describes both."""
    if "subject" not in session.kept:
        session.release()
        sizes = session.sizes
        name = sizes.preset or fitting_preset(session.free_bytes())
        begin = time.monotonic()
        target = random_model(scaled_config(name, sizes.scale), device=session.device)
        config = scaled_config(DRAFT, sizes.draft_scale)
        config.vocab_size = target.config.vocab_size
        draft = random_model(config, device=session.device, seed=1)
        label = name if sizes.scale == 1.0 else f"{name}@{sizes.scale:g}"
        session.lines.write("models", target=label, seconds=round(time.monotonic() - begin, 1))
        alpha = float(alpha_from_sigma(SIGMA, SIGMA_GAMMA))
        session.kept["subject"] = (
            label,
            Subject(target, draft, alpha),
            _setup(session, target, draft),
        )
    return session.kept["subject"]


def layer_jobs(session: Session) -> list[Job]:
    """Calls of the target's MoE layers at every number of tokens a decode cell will have."""
    sizes = session.sizes
    if not session.cuda:
        return []
    spec = preset_spec(sizes.preset or fitting_preset(session.free_bytes()))
    rows = {B * (gamma + 1) for B, gammas in sizes.cells for gamma in (0, *gammas)}
    shapes = {
        Shape(x.num_experts, x.top_k, spec.hidden, x.expert // (3 * spec.hidden))
        for x in spec.layers
        if x.num_experts
    }
    return [Job(shape, T) for shape in shapes for T in sorted(rows)]


def _setup(session: Session, target: Any, draft: Any) -> dict[str, Any]:
    found = session.lines.find("machine")
    if not found:
        raise RuntimeError("expected this machine's description, which was not measured")
    machine = Machine.from_json(found[-1]["machine"])
    specs = spec_from_config(target.config), spec_from_config(draft.config)
    return setup_fields(*specs, machine, "bf16")


def measure(session: Session) -> None:
    """Every cell of the map that has no line yet, best ones first.

    Raises:
        RuntimeError: batches failed; the others were measured.
        OutOfTimeError: cells are left.
    """
    failed = []
    for batch, gammas in session.sizes.cells:
        if not session.begin(f"B={batch} gammas={gammas}"):
            continue
        done = {line["gamma"] for line in session.lines.find("decode", batch=batch)}
        missing = [gamma for gamma in gammas if gamma not in done]
        if not missing:
            continue
        name, measured, setup = subject(session)
        session.need(CELL_S)
        try:
            _measure_batch(session, name, measured, setup, batch, missing)
        except (RuntimeError, ValueError) as error:
            failed.append(f"B={batch}: {type(error).__name__}: {error}"[:300])
            if not session.usable():
                break
    if failed:
        raise RuntimeError("; ".join(failed))


def _measure_batch(
    session: Session,
    name: str,
    measured: Subject,
    setup: dict[str, Any],
    batch: int,
    gammas: list[int],
) -> None:
    sizes = session.sizes
    pairs = measure_batch(
        measured,
        batch,
        gammas,
        prompt_tokens=sizes.prompt_tokens,
        new_tokens=sizes.new_tokens,
        repetitions=sizes.repetitions,
    )
    for pair in pairs:
        session.lines.write("decode", **cell_fields(name, measured, pair, setup))


def profile_steps(session: Session) -> None:
    """Kernels of one replayed forward of the target: how many, how long, which; of 1 and 5 rows.

    On the kernels of a decode step, and without them: module by module, as transformers has it.
    Then of whole rounds, with what PyTorch is asked for beside the graphs.
    """
    name, measured, _ = subject(session)
    for gamma in PROFILED_GAMMAS:
        if not session.lines.find("round", target=name, gamma=gamma):
            session.need(CELL_S)
            _profile_rounds(session, name, measured, gamma)
    model = accelerate(measured.target)
    for attention in FORMS:
        todo = [
            queries
            for queries in PROFILED_ROWS
            if not session.lines.find("step", target=name, queries=queries, attention=attention)
        ]
        if todo:
            session.need(CELL_S)
            runner = ModelRunner(model, PROFILED_BATCH, 320, attention)
            what = {"target": name, "B": PROFILED_BATCH, "attention": attention}
            _profile_steps(session, runner, todo, what)


def _profile_steps(
    session: Session, runner: ModelRunner, todo: list[int], what: dict[str, Any]
) -> None:
    rows = torch.arange(PROFILED_BATCH, device=session.device)
    for queries in todo:
        steps = torch.arange(queries, device=session.device)
        positions = (steps + 40).expand(PROFILED_BATCH, -1).contiguous()
        ids = torch.randint(3, runner.vocab_size, positions.shape, device=session.device)

        def step(ids: Any = ids, positions: Any = positions) -> None:
            runner.forward(ids, rows, positions, max_position=60)

        session.lines.write("step", **what, queries=queries, **_profiled(session, step))


def _profile_rounds(session: Session, name: str, measured: Subject, gamma: int) -> None:
    drafter = drafter_for(replace(measured, alpha=None)) if gamma else None
    decoder = SpeculativeDecoder(
        measured.target, drafter, gamma, max_batch_size=PROFILED_BATCH, max_length=320
    )
    params = SamplingParams(max_new_tokens=128, ignore_eos=True)
    for prompt in random_prompts(PROFILED_BATCH, PROFILED_PROMPT, decoder.runner.vocab_size):
        decoder.add(prompt, params)
    for _ in range(2):  # the prefill, and a round in which the draft model catches up
        decoder.step()
    found = _profiled(session, decoder.step)
    with OperationCount() as operations:
        decoder.step()
    what = {"target": name, "B": PROFILED_BATCH, "gamma": gamma, "operations": operations.count}
    session.lines.write("round", **what, **found)


def _profiled(session: Session, step: Any) -> dict[str, Any]:
    """Wall milliseconds of a step, and of its kernels by name (on a CPU: of its operators)."""
    synchronize = torch.cuda.synchronize if session.cuda else lambda: None
    activity = ProfilerActivity.CUDA if session.cuda else ProfilerActivity.CPU
    for _ in range(3):  # compiles, then captures
        step()
    synchronize()
    begin, count = time.perf_counter(), 5
    for _ in range(count):
        step()
    synchronize()
    wall = (time.perf_counter() - begin) / count
    with profile(activities=[activity]) as profiler:
        step()
        synchronize()
    launches, micros = Counter[str](), Counter[str]()
    for event in profiler.events():
        spent = event.device_time_total if session.cuda else event.self_cpu_time_total
        if spent > 0:
            launches[event.name[:60]] += 1
            micros[event.name[:60]] += spent
    return {
        "wall_ms": 1e3 * wall,
        "kernels": sum(launches.values()),
        "busy_ms": sum(micros.values()) / 1e3,
        "top": [[name, launches[name], round(us)] for name, us in micros.most_common(TOP_KERNELS)],
    }


def fit(session: Session) -> None:
    """Both performance models on 21 cells of the map, judged on the others.

    Raises:
        OutOfTimeError: the map has too few cells yet.
    """
    points = session.sizes.fit_points
    if len(session.lines.find("decode")) <= points:
        raise OutOfTimeError
    for cells in load_cells([session.folder / FILE]):
        record_errors(session.lines, cells, fit_cells(cells, points, DESIGN), DESIGN)
