"""One batch of prompts decoded by us, by transformers' ``generate`` and by vLLM, round by round."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.measure.timer import interleaved, summarize
from bench.peers.generate_transformers import TransformersGenerate
from bench.peers.vllm_generate import VllmGenerate
from bench.workloads.models import draft_like, load_model, moe_310m, random_model
from bench.workloads.prompts import load_prompts, random_prompts
from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import ReplayDrafter, build_drafter
from decoder.drafters.independent import IndependentDrafter
from decoder.embedded import draft_path, target_path
from decoder.model.loading import load_tokenizer
from moesd_kernels import accelerate

VOCAB_SIZE = 4096  # of random prompts
PEERS = ("ours", "transformers", "vLLM")

Run = Callable[[list[list[int]], int], tuple[float, list[list[int]]]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What stays the same over all batches of a run.

    Attributes:
        target: ``moe-310m``, ``embedded``, or a path.
        draft: path of a draft model, or None; the embedded pair has its own.
        alpha: acceptance imposed by the replay drafter, or None.
        gamma: draft length as text, or ``auto``.
        prompts: a data set's name or a JSONL file; None makes random ones of ``prompt_tokens``.
        transformers: whether transformers' ``generate`` is a peer.
        vllm_python: python of an environment with vLLM, which is then a peer, or None.
    """

    target: str
    draft: str | None
    alpha: float | None
    gamma: str
    prompts: str | None
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
        return self.alpha is not None or bool(self.draft) or self.target == "embedded"


def measure_generate(settings: Settings, batch: int) -> list[dict[str, Any]]:
    """Tokens per second of every variant: the fields of its ``generate`` lines."""
    prompts = _prompts(settings, batch)
    variants: dict[str, Run] = {"ours": _ours(settings, prompts, None)}
    if settings.speculative:
        variants["ours speculative"] = _ours(settings, prompts, settings.gamma)
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
        "target": settings.target,
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
    """A fresh target: each variant gets its own, so that no hook of ours speeds up a peer."""
    if settings.target == "moe-310m":
        return random_model(moe_310m(), settings.dtype, settings.device)
    return load_model(_path(settings), settings.dtype, settings.device)


def _path(settings: Settings) -> str:
    return str(target_path()) if settings.target == "embedded" else settings.target


def _prompts(settings: Settings, batch: int) -> list[list[int]]:
    if settings.prompts is None:
        return random_prompts(batch, settings.prompt_tokens, VOCAB_SIZE)
    tokenizer = load_tokenizer(_path(settings))
    return [tokenizer(text)["input_ids"] for text in load_prompts(settings.prompts, batch)]


def _drafter(settings: Settings, target: Any) -> Any:
    if settings.alpha is not None:
        cost = random_model(draft_like(target.config), target.dtype, target.device, seed=1)
        return ReplayDrafter(settings.alpha, cost=IndependentDrafter(accelerate(cost)))
    draft = draft_path() if settings.target == "embedded" else settings.draft
    return build_drafter("auto", target, draft)


def _ours(settings: Settings, prompts: list[list[int]], gamma: str | None) -> Run:
    """Our decoder as a variant; without a gamma it decodes autoregressively."""
    target = _target(settings)
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
