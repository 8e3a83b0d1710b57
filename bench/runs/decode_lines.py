"""A decode measurement as a line: what describes its subject, and one cell of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bench.measure.ceilings import CeilingProbe
from bench.measure.machine import machine_with_kernels
from bench.runs.cells import setup_fields
from bench.runs.decode import Pair
from bench.runs.subject import Subject
from bench.workloads.kept import spec_as_kept
from decoder.drafters.heads.eagle_config import EagleCheckpoint
from decoder.perf_model.hardware.measure_machine import DTYPE_NAMES
from decoder.perf_model.model_spec import ModelSpec, eagle_spec

PROBES = 3


def describe_subject(
    subject: Subject, device: str, probe: CeilingProbe | None = None
) -> dict[str, Any]:
    """Machine and specs of a subject, measured with the operations it runs.

    With a probe also the read bandwidth at that time: later cells are judged by theirs against it.
    """
    dtype = subject.target.dtype
    reads = [probe.read() for _ in range(PROBES)] if probe else []
    machine = machine_with_kernels(device, dtype)
    reads += [probe.read() for _ in range(PROBES)] if probe else []
    target = spec_as_kept(subject.target)
    # The machine's curves are the fastest seen, so the reference is, too.
    reference = {"machine_read_bandwidth": max(reads)} if reads else {}
    draft = draft_spec(subject.draft, target)
    return setup_fields(target, draft, machine, DTYPE_NAMES[dtype]) | reference


def draft_spec(draft: Any, target: ModelSpec) -> ModelSpec | None:
    """What a step of a draft costs; None where it reads no weights of its own."""
    if draft is None or isinstance(draft, str):
        return None
    if not isinstance(draft, EagleCheckpoint):
        return spec_as_kept(draft)
    # A head of the target's class, as wide as this one is and with the vocabulary it speaks.
    spec = eagle_spec(target)
    (layer,) = spec.layers
    sizes = {name: w.numel() for name, w in draft.weights.items() if w.dim() == 2}
    head, own = sizes.pop("lm_head.weight", spec.head), sizes.pop("embed_tokens.weight", 0)
    read = replace(layer, dense=sum(sizes.values()) - layer.attention)
    return replace(
        spec,
        vocab=head // target.hidden,
        head=head,
        layers=(read,),
        embedding=own or spec.embedding,
    )


def memory_speed(pair: Pair, setup: dict[str, Any]) -> dict[str, float]:
    """How fast memory was for this cell, relative to when the machine was described."""
    reference = setup.get("machine_read_bandwidth")
    if not (reference and pair.read_bandwidth):
        return {}
    return {"memory_speed": pair.read_bandwidth / reference}


def cell_fields(
    name: str, subject: Subject, pair: Pair, setup: Mapping[str, Any]
) -> dict[str, Any]:
    """One cell in the words of ``Observation``, and what else was seen.

    Its ``alpha`` is the one imposed, or what the draft's own proposals came to.

    Args:
        setup: what ``describe_subject`` found. The draft is described again where it was run in
            other numbers for this batch.
    """
    described = {} if pair.draft is None else {"draft_spec": pair.draft.to_json()}
    return {
        **setup,
        **described,
        "draft_format": pair.draft_format,
        "target": name,
        "top_k": subject.top_k,
        "batch": pair.batch,
        "gamma": pair.gamma,
        "alpha": pair.alpha if subject.alpha is None else subject.alpha,
        "decided": pair.decided,
        "context": pair.context,
        "sigma": pair.sigma,
        "ar_time": pair.ar.verify,
        "verify_time": pair.spec.verify,
        "draft_time": pair.spec.draft / pair.gamma,
        "reject_time": pair.spec.sample,
        "host_time": pair.spec.host,
        "ar_step": pair.ar.total,
        "target_efficiency": pair.ar.verify / pair.spec.verify,
        "speedup": pair.speedup,
        "speedup_p20_p80": pair.speedup_range,
        "ar_tokens_per_s": pair.batch / pair.ar.total,
        "identical": pair.identical,
        "forced": subject.forced,
        "agreement": pair.agreement,
        "experts_ar": pair.experts_ar,
        "experts_verify": pair.experts_verify,
        "read_bandwidth": pair.read_bandwidth,
        "offload_ar": pair.offload_ar,
        "offload_verify": pair.offload_spec,
        "collective_ar_time": pair.collective_ar,
        "collective_verify_time": pair.collective_verify,
    }
