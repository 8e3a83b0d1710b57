"""One batch of prompts decoded by us, by transformers' ``generate`` and by vLLM, round by round."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.measure.timer import interleaved, summarize
from bench.peers.generate_transformers import TransformersGenerate
from bench.peers.vllm_generate import VllmGenerate
from bench.workloads.models import draft_like, moe_310m, random_model
from bench.workloads.prompts import prompt_tokens, random_prompts
from bench.workloads.trained import TrainedPair
from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import ReplayDrafter, build_drafter
from decoder.drafters.independent import IndependentDrafter
from moesd_kernels import accelerate

VOCAB_SIZE = 4096  # of random prompts
RANDOM = "moe-310m"
PEERS = ("ours", "transformers", "vLLM")

Run = Callable[[list[list[int]], int], tuple[float, list[list[int]]]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What stays the same over all batches of a run.

    Attributes:
        pair: what is decoded; None is the random 310M model.
        alpha: acceptance imposed by the replay drafter, or None.
        gamma: draft length as text, or ``auto``.
        prompts: a data set's name or a JSONL file; None makes random ones of ``prompt_tokens``.
        prompts_dir: folder of the data sets.
        transformers: whether transformers' ``generate`` is a peer.
        vllm_python: python of an environment with vLLM, which is then a peer, or None.
    """

    pair: TrainedPair | None
    alpha: float | None
    gamma: str
    prompts: str | None
    prompts_dir: Path
    prompt_tokens: int
    new_tokens: int
    rounds: int
    dtype: torch.dtype
    device: str
    transformers: bool
    vllm_python: str | None

    @property
    def speculative(self) -> bool:
        """Whether there is anything to draft with."""
        return self.alpha is not None or (self.pair is not None and self.pair.drafter != "none")


def measure_generate(settings: Settings, batch: int) -> list[dict[str, Any]]:
    """Tokens per second of every variant: the fields of its ``generate`` lines."""
    prompts = _prompts(settings, batch)
    target = _target(settings)
    variants: dict[str, Run] = {"ours": _ours(settings, target, prompts, None)}
    if settings.speculative:
        variants["ours speculative"] = _ours(settings, target, prompts, settings.gamma)
    if settings.transformers:
        variants["transformers"] = TransformersGenerate(_target(settings)).run
    vllm = _vllm(settings, batch)
    if vllm:
        variants["vLLM"] = vllm.run
    outputs: dict[str, list[list[int]]] = {}

    def timed(name: str) -> Callable[[int], float]:
        def one(_round: int) -> float:
            seconds, outputs[name] = variants[name](prompts, settings.new_tokens)
            return seconds

        return one

    try:
        samples = interleaved({name: timed(name) for name in variants}, rounds=settings.rounds)
    finally:
        if vllm:
            vllm.close()
    return [_fields(settings, batch, name, samples, outputs) for name in samples]


def _fields(
    settings: Settings,
    batch: int,
    name: str,
    samples: dict[str, list[float]],
    outputs: dict[str, list[list[int]]],
) -> dict[str, Any]:
    seconds = samples[name]
    return {
        "target": settings.pair.name if settings.pair else RANDOM,
        "drafter": settings.pair.drafter if settings.pair else None,
        "prompts": settings.prompts,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "B": batch,
        "variant": name,
        "alpha": settings.alpha,
        "gamma": settings.gamma,
        "new_tokens": settings.new_tokens,
        "tokens_per_s": summarize([batch * settings.new_tokens / s for s in seconds]).as_dict(),
        "times_faster_than": {
            peer: summarize([p / s for p, s in zip(samples[peer], seconds, strict=True)]).median
            for peer in PEERS
            if peer in samples
        },
        "identical_to_ours": sum(
            a == b for a, b in zip(outputs[name], outputs["ours"], strict=True)
        ),
    }


def _target(settings: Settings) -> Any:
    """A fresh target: a peer gets its own, so that no hook of ours speeds it up."""
    if settings.pair is None:
        return random_model(moe_310m(), settings.dtype, settings.device)
    return settings.pair.load_target(settings.dtype, settings.device)


def _prompts(settings: Settings, batch: int) -> list[list[int]]:
    if settings.pair is None or settings.prompts is None:
        return random_prompts(batch, settings.prompt_tokens, VOCAB_SIZE)
    tokenizer = settings.pair.load_tokenizer()
    prompts = prompt_tokens(tokenizer, settings.prompts, settings.prompts_dir)
    if len(prompts) < batch:
        raise ValueError(f"{settings.prompts} has {len(prompts)} prompts, expected {batch}")
    return prompts[:batch]


def _drafter(settings: Settings, target: Any) -> Any:
    if settings.alpha is not None:
        cost = random_model(draft_like(target.config), target.dtype, target.device, seed=1)
        return ReplayDrafter(settings.alpha, cost=IndependentDrafter(accelerate(cost)))
    assert settings.pair is not None  # there is something to draft with
    return build_drafter(settings.pair.drafter, target, settings.pair.draft)


def _ours(settings: Settings, target: Any, prompts: list[list[int]], gamma: str | None) -> Run:
    """Our decoder as a variant; without a gamma it decodes autoregressively."""
    decoder = SpeculativeDecoder(
        target,
        drafter=_drafter(settings, target) if gamma else None,
        gamma="auto" if gamma == "auto" else int(gamma or 0),
        max_batch_size=len(prompts),
        max_length=max(map(len, prompts)) + settings.new_tokens + 16,
    )
    params = SamplingParams(max_new_tokens=settings.new_tokens, ignore_eos=True)

    def one(prompts: list[list[int]], _new_tokens: int) -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        outputs = decoder.generate(prompts, params)
        return time.perf_counter() - begin, [list(o.token_ids) for o in outputs]

    return one


def _vllm(settings: Settings, batch: int) -> VllmGenerate | None:
    if not settings.vllm_python:
        return None
    folder = tempfile.mkdtemp(prefix="moesd-vllm-")
    _target(settings).save_pretrained(folder)
    return VllmGenerate(settings.vllm_python, folder, torch.get_num_threads(), batch)
