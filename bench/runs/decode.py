"""One batch of the decode measurement: autoregressive and speculative runs, round by round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from bench.measure.telemetry import count_experts
from bench.measure.timer import summarize
from bench.runs.forced import ForcedSampler, force
from bench.workloads.prompts import random_prompts
from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import ReplayDrafter
from decoder.drafters.eagle import EagleDrafter
from decoder.drafters.eagle_config import EagleCheckpoint
from decoder.drafters.independent import IndependentDrafter
from decoder.engine.profile_rounds import RoundLog
from moesd_kernels import accelerate

Round = tuple[int, Mapping[str, float]]  # tokens emitted, seconds by phase
# Experts are counted outside the graphs, where a step of a large model costs host time.
COUNTED_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: a target, a draft, and the acceptance imposed on it.

    Attributes:
        draft: a draft model, an ``EagleCheckpoint``, or None: proposals cost nothing.
        alpha: acceptance per token imposed by the replay drafter; None uses the draft's own.
        prompts: token ids to draw a batch from, first ones first; None makes random ones.
    """

    target: Any
    draft: Any | None
    alpha: float | None
    temperature: float = 0.0
    prompts: Sequence[list[int]] | None = None

    @property
    def verifier(self) -> Literal["standard", "coupled"]:
        """``coupled`` where replay meets sampling: its output is the target's own for the seed, so
        that a recorded continuation stays the right answer."""
        return "coupled" if self.temperature and self.alpha is not None else "standard"

    @property
    def forced(self) -> bool:
        """Whether replay decides instead of the target: where rounding depends on shapes."""
        return self.alpha is not None and self.target.device.type == "cuda"

    @property
    def top_k(self) -> int | None:
        """Experts per token, None for a dense target."""
        return getattr(self.target.config, "num_experts_per_tok", None)


@dataclass(frozen=True, slots=True)
class RoundTimes:
    """Median seconds of a full-batch round by phase."""

    draft: float
    verify: float
    sample: float
    host: float

    @property
    def total(self) -> float:
        """Seconds of the whole round."""
        return self.draft + self.verify + self.sample + self.host


@dataclass(frozen=True, slots=True)
class Pair:
    """One (B, gamma): both modes, measured in the same repetitions.

    Attributes:
        identical: whether speculative outputs were the autoregressive ones; None where verdicts
            were forced, which makes them so by construction.
        agreement: with forced verdicts, how often the target's own choice was the recorded token.
    """

    batch: int
    gamma: int
    context: int
    ar: RoundTimes
    spec: RoundTimes
    sigma: float
    speedup: float
    speedup_range: tuple[float, float]
    identical: bool | None
    agreement: float | None
    experts_ar: float | None
    experts_verify: float | None
    read_bandwidth: float | None


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen beside the times of a batch.

    Attributes:
        context: tokens a row held on average.
        experts: tokens entering a layer -> mean distinct experts.
        read_bandwidth: bytes/s that memory gave.
        agreement: see ``Pair``.
    """

    context: int
    experts: dict[int, float]
    read_bandwidth: float | None
    agreement: float | None


def measure_batch(
    subject: Subject,
    batch: int,
    gammas: Sequence[int],
    *,
    prompt_tokens: int,
    new_tokens: int,
    repetitions: int,
    read: Callable[[], float] | None = None,
) -> list[Pair]:
    """Measure ``batch`` sequences autoregressively and with each gamma.

    Args:
        read: bytes/s that memory gives now; taken between runs.
        new_tokens: length of the autoregressive run; speculative runs emit as many.
        repetitions: of the whole cycle after one warm-up cycle, which also records the target's
            continuations for the replay drafter.
    """
    prompts = [list(p) for p in (subject.prompts or ())[:batch]]
    prompts = prompts or random_prompts(batch, prompt_tokens, subject.target.config.vocab_size)
    prompt_tokens = max(map(len, prompts))
    params = SamplingParams(
        max_new_tokens=new_tokens,
        ignore_eos=True,
        temperature=subject.temperature,
        seed=0,  # the same draws in every run: outputs are compared, and replayed
    )
    plain = _decoder(subject, None, batch, prompt_tokens + new_tokens, 0)
    replay = drafter_for(subject)
    fast = _decoder(subject, replay, batch, prompt_tokens + new_tokens, max(gammas))
    wanted = [list(o.token_ids) for o in plain.generate(prompts, params)]
    forced: ForcedSampler | None = None
    if isinstance(replay, ReplayDrafter):
        replay.recordings.update({tuple(p): t for p, t in zip(prompts, wanted, strict=True)})
        forced = force(fast, replay) if subject.forced else None
    runs: dict[int, list[list[Round]]] = {gamma: [] for gamma in (0, *gammas)}
    identical = dict.fromkeys(gammas, True)
    reads: list[float] = []
    for repetition in range(-1, repetitions):
        for gamma in runs:
            decoder = fast if gamma else plain
            log = decoder.controller = RoundLog(gamma, max(gammas))
            outputs = decoder.generate(prompts, params)
            if gamma:
                identical[gamma] &= [list(o.token_ids) for o in outputs] == wanted
            if repetition >= 0:
                runs[gamma].append(log.full(batch))
                if read:
                    reads.append(read())
    seen = Seen(
        context=prompt_tokens + new_tokens // 2,
        experts=_experts(subject, plain, fast, gammas, prompts, params),
        read_bandwidth=statistics.median(reads) if reads else None,
        agreement=forced.agreement() if forced else None,
    )
    return [
        _pair(batch, gamma, runs[0], runs[gamma], None if forced else identical[gamma], seen)
        for gamma in gammas
        if runs[gamma]
    ]


def _decoder(
    subject: Subject, drafter: Any, batch: int, length: int, max_gamma: int
) -> SpeculativeDecoder:
    return SpeculativeDecoder(
        subject.target,
        drafter=drafter,
        gamma=RoundLog(max_gamma=max_gamma),
        verifier=subject.verifier,
        max_batch_size=batch,
        max_length=length,
    )


def drafter_for(subject: Subject) -> Any:
    """The drafter that imposes the subject's acceptance at its draft's cost."""
    draft: Any = None
    if isinstance(subject.draft, EagleCheckpoint):
        draft = EagleDrafter(subject.draft, kernels=True)
    elif subject.draft is not None:
        draft = IndependentDrafter(accelerate(subject.draft))
    return draft if subject.alpha is None else ReplayDrafter(subject.alpha, cost=draft)


def _experts(
    subject: Subject,
    plain: SpeculativeDecoder,
    fast: SpeculativeDecoder,
    gammas: Sequence[int],
    prompts: list[list[int]],
    params: SamplingParams,
) -> dict[int, float]:
    """Tokens entering a layer -> mean distinct experts, from untimed runs."""
    if subject.top_k is None:
        return {}
    means: dict[int, float] = {}
    params = replace(params, max_new_tokens=min(COUNTED_TOKENS, params.max_new_tokens))
    for gamma in (0, *gammas):
        decoder = fast if gamma else plain
        decoder.controller = RoundLog(gamma, max(gammas))
        # Modules must really be called: neither a graph's replay nor a walk in C++ runs hooks.
        with count_experts(subject.target) as counter, decoder.runner.eager():
            decoder.generate(prompts, params)
        means |= counter.mean_by_tokens()
    return means


def _pair(
    batch: int,
    gamma: int,
    plain: list[list[Round]],
    fast: list[list[Round]],
    identical: bool | None,
    seen: Seen,
) -> Pair:
    rate = lambda run: sum(e for e, _ in run) / sum(sum(t.values()) for _, t in run)
    ratios = [rate(f) / rate(p) for p, f in zip(plain, fast, strict=True) if p and f]
    emitted = sum(e for run in fast for e, _ in run)
    rounds = sum(len(run) for run in fast)
    spread = summarize(ratios)
    return Pair(
        batch=batch,
        gamma=gamma,
        context=seen.context,
        ar=_times(plain),
        spec=_times(fast),
        sigma=emitted / (rounds * batch * (gamma + 1)),
        speedup=spread.median,
        speedup_range=(spread.p20, spread.p80),
        identical=identical,
        agreement=seen.agreement,
        experts_ar=seen.experts.get(batch),
        experts_verify=seen.experts.get(batch * (gamma + 1)),
        read_bandwidth=seen.read_bandwidth,
    )


def _times(runs: list[list[Round]]) -> RoundTimes:
    median = lambda phase: statistics.median(t.get(phase, 0.0) for run in runs for _, t in run)
    return RoundTimes(*(median(phase) for phase in ("draft", "verify", "sample", "host")))
