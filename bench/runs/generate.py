"""One batch of prompts decoded by us and by others, round by round."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gguf.contents import PLAIN, contents_of
from bench.measure.timer import interleaved, summarize
from bench.peers.generate_transformers import TransformersGenerate
from bench.peers.llama_cpp import LlamaCpp, mean_length
from bench.runs.in_vllm import VLLM, InVllm
from bench.workloads.kept import draft_format
from bench.workloads.models import RANDOM, draft_like, random_model
from bench.workloads.prompts import first_prompts, prompt_tokens, random_prompts
from bench.workloads.trained import TrainedPair
from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import ReplayDrafter, build_drafter
from decoder.drafters.independent import IndependentDrafter
from decoder.model.kernels import with_int8_activations
from moesd_kernels import accelerate, quantize

VOCAB_SIZE = 4096  # of random prompts
LLAMA_CPP = "llama.cpp"
PEERS = ("ours", "transformers", VLLM, LLAMA_CPP)

Run = Callable[[list[list[int]], int], tuple[float, list[list[int]]]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What stays the same over all batches of a run.

    Attributes:
        pair: what is decoded; None is a random model.
        random: its name, of ``RANDOM``.
        alpha: acceptance imposed by the replay drafter, or None.
        gammas: draft lengths as text, or ``auto``: a variant each.
        prompts: a data set's name or a JSONL file; None makes random ones of ``prompt_tokens``.
        prompts_dir: folder of the data sets.
        transformers: whether transformers' ``generate`` is a peer.
        vllm_python: python of an environment with vLLM, which is then a peer, or None; where our
            plugin is installed there, with our experts inside, too.
        llama_cpp: folder of llama.cpp's programs, which is then a peer, or None.
        gguf: the file it runs on.
        weight_format: our target is quantised to, "int8" or "int4"; peers keep theirs.
        int8_activations: whether our target's quantised layers round their inputs to eight bits.
    """

    pair: TrainedPair | None
    random: str
    alpha: float | None
    gammas: Sequence[str]
    prompts: str | None
    prompts_dir: Path
    prompt_tokens: int
    new_tokens: int
    rounds: int
    dtype: torch.dtype
    device: str
    transformers: bool
    vllm_python: str | None
    llama_cpp: Path | None = None
    gguf: Path | None = None
    weight_format: str = PLAIN
    int8_activations: bool = False

    def __post_init__(self) -> None:
        if self.llama_cpp and self.gguf is None:
            raise ValueError("llama.cpp is a peer on a GGUF file, which must be given, got none")
        if self.pair is None and self.prompts is not None:
            raise ValueError(f"a random model's prompts are random, got {self.prompts}")

    @property
    def speculative(self) -> bool:
        """Whether there is anything to draft with."""
        return self.alpha is not None or (self.pair is not None and self.pair.drafter != "none")


def measure_generate(settings: Settings, batch: int) -> list[dict[str, Any]]:
    """Tokens per second of every variant: the fields of its ``generate`` lines."""
    llama_cpp = _llama_cpp(settings)  # before a model is loaded in vain
    prompts = _prompts(settings, batch)
    target = _target(settings)
    if settings.weight_format != PLAIN:
        quantize(target, settings.weight_format)
    if settings.int8_activations:
        with_int8_activations(target)
    variants: dict[str, Run] = {"ours": _ours(settings, target, prompts, None, "0")}
    drafts: dict[str, str] = {}
    for name, gamma in _speculative(settings).items():
        drafter = _drafter(settings, target)
        variants[name] = _ours(settings, target, prompts, drafter, gamma)
        drafts[name] = draft_format(drafter)  # as the decoder has made it for its rows
    if settings.transformers:
        variants["transformers"] = TransformersGenerate(_target(settings)).run
    vllm = _vllm(settings, batch)
    if vllm:
        variants |= {name: functools.partial(vllm.run, name) for name in vllm.engines}
    if llama_cpp:
        variants[LLAMA_CPP] = llama_cpp.run
    outputs: dict[str, list[list[int]]] = {}

    def timed(name: str) -> Callable[[int], float]:
        def one(_round: int) -> float:
            # llama.cpp counts the second of two passes, when what it reads may lie in a cache.
            for _ in range(2 if llama_cpp and name != LLAMA_CPP else 1):
                seconds, outputs[name] = variants[name](prompts, settings.new_tokens)
            return seconds

        return one

    try:
        samples = interleaved({name: timed(name) for name in variants}, rounds=settings.rounds)
        if vllm:
            vllm.run_one_by_one(prompts, settings.new_tokens)
    finally:
        if vllm:
            vllm.close()
    common = _common_fields(settings, prompts)
    if llama_cpp:
        common["llama_cpp"] = llama_cpp.version
    return [
        common
        | _weight_fields(settings, name)
        | {"draft_format": drafts.get(name)}
        | _fields(settings, batch, name, samples, outputs)
        | (vllm.fields(name) if vllm else {})
        for name in samples
    ]


def _speculative(settings: Settings) -> dict[str, str]:
    """Our speculative variants and their draft lengths."""
    if not settings.speculative:
        return {}
    if len(settings.gammas) == 1:
        return {"ours speculative": settings.gammas[0]}
    return {f"ours speculative, γ = {gamma}": gamma for gamma in settings.gammas}


def _common_fields(settings: Settings, prompts: list[list[int]]) -> dict[str, Any]:
    return {
        "target": settings.pair.name if settings.pair else settings.random,
        "drafter": settings.pair.drafter if settings.pair else None,
        "prompts": settings.prompts,
        "prompt_tokens": mean_length(prompts),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "alpha": settings.alpha,
        "new_tokens": settings.new_tokens,
    }


def _weight_fields(settings: Settings, name: str) -> dict[str, Any]:
    """How a variant's weights are stored, as in its file where it runs on one, and multiplied."""
    target = settings.pair.target if settings.pair else None
    ours = name in _ours_of(settings)
    file = settings.gguf if name == LLAMA_CPP else target
    rounding = {"int8_activations": True} if ours and settings.int8_activations else {}
    if file is None or file.suffix != ".gguf":
        return {"weight_format": settings.weight_format if ours else PLAIN} | rounding
    contents = contents_of(file)
    return {"weight_format": contents.weight_format, "gguf": contents._asdict()} | rounding


def _ours_of(settings: Settings) -> set[str]:
    """Our variants' names."""
    return {"ours", *_speculative(settings)}


def _fields(
    settings: Settings,
    batch: int,
    name: str,
    samples: dict[str, list[float]],
    outputs: dict[str, list[list[int]]],
) -> dict[str, Any]:
    seconds = samples[name]
    same = sum(a == b for a, b in zip(outputs[name], outputs["ours"], strict=False))
    return {
        "B": batch,
        "variant": name,
        "gamma": _speculative(settings).get(name),
        "tokens_per_s": summarize([batch * settings.new_tokens / s for s in seconds]).as_dict(),
        "times_faster_than": {
            peer: summarize([p / s for p, s in zip(samples[peer], seconds, strict=True)]).median
            for peer in PEERS
            if peer in samples
        },
        # Some peers are timed without their tokens being seen.
        "identical_to_ours": same if outputs[name] else None,
    }


def _target(settings: Settings) -> Any:
    """A fresh target: a peer gets its own, so that no hook of ours speeds it up."""
    if settings.pair is None:
        return random_model(RANDOM[settings.random](), settings.dtype, settings.device)
    return settings.pair.load_target(settings.dtype, settings.device)


def _prompts(settings: Settings, batch: int) -> list[list[int]]:
    if settings.pair is None or settings.prompts is None:
        return random_prompts(batch, settings.prompt_tokens, VOCAB_SIZE)
    tokenizer = settings.pair.load_tokenizer()
    prompts = prompt_tokens(tokenizer, settings.prompts, settings.prompts_dir)
    return first_prompts(prompts, batch, settings.prompts)


def _drafter(settings: Settings, target: Any) -> Any:
    if settings.alpha is not None:
        cost = random_model(draft_like(target.config), target.dtype, target.device, seed=1)
        return ReplayDrafter(settings.alpha, cost=IndependentDrafter(accelerate(cost)))
    assert settings.pair is not None  # there is something to draft with
    return build_drafter(settings.pair.drafter, target, settings.pair.draft)


def _ours(
    settings: Settings, target: Any, prompts: list[list[int]], drafter: Any, gamma: str
) -> Run:
    """Our decoder as a variant; without a drafter it decodes autoregressively."""
    decoder = SpeculativeDecoder(
        target,
        drafter=drafter,
        gamma="auto" if gamma == "auto" else int(gamma),
        max_batch_size=len(prompts),
        max_length=max(map(len, prompts)) + settings.new_tokens + 16,
    )
    params = SamplingParams(max_new_tokens=settings.new_tokens, ignore_eos=True)

    def one(prompts: list[list[int]], _new_tokens: int) -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        outputs = decoder.generate(prompts, params)
        return time.perf_counter() - begin, [list(o.token_ids) for o in outputs]

    return one


def _vllm(settings: Settings, batch: int) -> InVllm | None:
    if not settings.vllm_python:
        return None
    return InVllm(settings.vllm_python, _target(settings), batch)


def _llama_cpp(settings: Settings) -> LlamaCpp | None:
    if settings.llama_cpp is None:
        return None
    assert settings.gguf  # Settings holds both or neither
    return LlamaCpp(settings.llama_cpp, settings.gguf, torch.get_num_threads())
