"""One batch of the decode measurement: autoregressive and speculative runs, round by round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.measure.storage import bytes_from_storage
from bench.measure.telemetry import count_experts
from bench.measure.timer import summarize
from bench.runs.forced import ForcedSampler, force
from bench.runs.rank_log import RankLog
from bench.runs.subject import Subject, drafter_for, logged_decoder
from bench.workloads.kept import draft_format, running_draft, spec_as_kept
from bench.workloads.prompts import random_prompts
from decoder import SamplingParams
from decoder.drafters import ReplayDrafter
from decoder.engine.metrics import DecoderStats
from decoder.perf_model.model_spec import ModelSpec

Prompts = list[list[int]]
Round = tuple[int, Mapping[str, float]]  # tokens emitted, seconds by phase
# Experts are counted outside the graphs, where a step of a large model costs host time.
COUNTED_TOKENS = 8
# Of a prompt where its content matters little: to warm up, and to count experts.
TAIL = 32


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
        alpha: drafts accepted, of those decided on.
        decided: how many those were.
        identical: whether speculative outputs were the autoregressive ones; None where verdicts
            were forced, which makes them so by construction, or where sampling draws others.
        agreement: with forced verdicts, how often the target's own choice was the recorded token.
        offload_ar: what reading experts came to in the last autoregressive run, where they do not
            stay in memory; offload_spec: in the last speculative one.
        draft_format: of most of the draft's weights, as it was run for this batch.
        draft: what a step of it costs; None where that is no draft model.
        collective_ar, collective_verify: median seconds of a round in collectives; ``RankLog``.
    """

    batch: int
    gamma: int
    context: int
    ar: RoundTimes
    spec: RoundTimes
    sigma: float
    alpha: float | None
    decided: int
    speedup: float
    speedup_range: tuple[float, float]
    identical: bool | None
    agreement: float | None
    experts_ar: float | None
    experts_verify: float | None
    read_bandwidth: float | None
    offload_ar: dict[str, Any] | None
    offload_spec: dict[str, Any] | None
    draft_format: str
    draft: ModelSpec | None
    collective_ar: float | None = None
    collective_verify: float | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen beside the times of a batch.

    Attributes:
        context: tokens a row held on average.
        experts: tokens entering a layer -> mean distinct experts.
        read_bandwidth: bytes/s that memory gave.
        agreement, draft_format, draft: see ``Pair``.
    """

    context: int
    experts: dict[int, float]
    read_bandwidth: float | None
    agreement: float | None
    draft_format: str
    draft: ModelSpec | None


@dataclass(slots=True)
class Arm:
    """The timed runs of one draft length: full rounds of each, drafts decided on and accepted."""

    rounds: list[list[Round]] = field(default_factory=list)
    identical: bool = True
    decided: int = 0
    accepted: int = 0
    offload: dict[str, Any] | None = None
    collective: list[float] = field(default_factory=list)


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
        prompt_tokens: length of random prompts.
        new_tokens: length of the autoregressive run; speculative runs emit as many.
        repetitions: of the whole cycle after one warm-up cycle. Each has prompts of its own where
            the subject brings enough of them.
        read: bytes/s that memory gives now; taken between runs.
    """
    waves = [_prompts(subject, batch, turn, prompt_tokens) for turn in range(repetitions)]
    longest = max(len(prompt) for wave in waves for prompt in wave)
    runs = _Runs(subject, batch, gammas, longest + new_tokens)
    short, few = _excerpt(subject, waves[0], new_tokens)
    # Graphs are captured by length, so there the warm-up is as long as what follows.
    on_cpu = subject.target.device.type == "cpu"
    runs.cycle(*((short, few) if on_cpu else (waves[0], new_tokens)))
    runs.forget()
    for wave in waves:
        runs.cycle(wave, new_tokens, read)
    seen = Seen(
        context=round(statistics.fmean(len(p) for wave in waves for p in wave)) + new_tokens // 2,
        experts=runs.experts(short, few),
        read_bandwidth=statistics.median(runs.reads) if runs.reads else None,
        agreement=runs.forced.agreement() if runs.forced else None,
        draft_format=draft_format(runs.drafter),
        draft=_draft_spec(runs.drafter),
    )
    return [
        _pair(batch, gamma, runs.arms, seen, comparable=subject.comparable)
        for gamma in gammas
        if any(runs.arms[gamma].rounds)
    ]


def _draft_spec(drafter: Any) -> ModelSpec | None:
    draft = running_draft(drafter)
    return None if draft is None else spec_as_kept(draft)


def _prompts(subject: Subject, batch: int, turn: int, length: int) -> Prompts:
    """The prompts of one repetition: the next ``batch``, from the first again after the last."""
    if subject.prompts is None:
        return random_prompts(batch, length, subject.target.config.vocab_size)
    places = range(turn * batch, (turn + 1) * batch)
    return [list(subject.prompts[place % len(subject.prompts)]) for place in places]


def _excerpt(subject: Subject, prompts: Prompts, new_tokens: int) -> tuple[Prompts, int]:
    """A short run like the real one; replay knows whole prompts and draws its coins by position."""
    tails = prompts if subject.alpha is not None else [prompt[-TAIL:] for prompt in prompts]
    return tails, min(COUNTED_TOKENS, new_tokens)


class _Runs:
    """Both decoders of one batch, and what their runs came to."""

    def __init__(self, subject: Subject, batch: int, gammas: Sequence[int], length: int) -> None:
        self.subject = subject
        self.batch = batch
        self.longest = max(gammas)
        drafter = self.drafter = drafter_for(subject)
        self.plain = logged_decoder(subject, None, batch, length, 0)
        self.fast = logged_decoder(subject, drafter, batch, length, self.longest)
        self.replay = drafter if isinstance(drafter, ReplayDrafter) else None
        self.forced: ForcedSampler | None = None
        if self.replay and subject.forced:
            self.forced = force(self.fast, self.replay)
        self.gammas = (0, *gammas)
        self.forget()

    def forget(self) -> None:
        """Count from here."""
        self.arms = {gamma: Arm() for gamma in self.gammas}
        self.reads: list[float] = []

    def cycle(
        self, prompts: Prompts, new_tokens: int, read: Callable[[], float] | None = None
    ) -> None:
        """Decode once with every gamma, none first: its outputs are what others are held to."""
        wanted: Prompts = []
        for gamma, arm in self.arms.items():
            stored = bytes_from_storage()
            log, outputs = self._run(gamma, prompts, new_tokens)
            if gamma == 0:
                wanted = outputs
                if self.replay:
                    recorded = zip(map(tuple, prompts), outputs, strict=True)
                    self.replay.recordings.update(recorded)
            arm.identical &= outputs == wanted
            arm.rounds.append(log.full(self.batch))
            arm.collective += log.collective(self.batch)
            stats = (self.fast if gamma else self.plain).stats
            arm.decided += stats.decided
            arm.accepted += stats.accepted
            if stats.offload is not None:
                arm.offload = _offload_fields(stats, stored)
            if read:
                self.reads.append(read())

    def experts(self, prompts: Prompts, new_tokens: int) -> dict[int, float]:
        """Tokens entering a layer in a whole round -> mean distinct experts, from untimed runs."""
        if self.subject.top_k is None:
            return {}
        means: dict[int, float] = {}
        for gamma in self.gammas:
            # Modules are really called: a runner that sees hooks neither replays nor walks past.
            with count_experts(self.subject.target) as counter:
                self._run(gamma, prompts, new_tokens)
            # A prefill's last layer has a token of each row, too, and prompts often end alike.
            tokens, counted = self.batch * (gamma + 1), counter.mean_by_tokens()
            means |= {tokens: counted[tokens]} if tokens in counted else {}
        return means

    def _run(self, gamma: int, prompts: Prompts, new_tokens: int) -> tuple[RankLog, Prompts]:
        decoder = self.fast if gamma else self.plain
        log = decoder.controller = RankLog(gamma, self.longest)
        params = SamplingParams(
            max_new_tokens=new_tokens, ignore_eos=True, temperature=self.subject.temperature
        )
        # The same draws in every run: outputs are compared, and replayed.
        seeded = [replace(params, seed=row) for row in range(len(prompts))]
        outputs = decoder.generate(prompts, seeded)
        return log, [list(output.token_ids) for output in outputs]


def _pair(batch: int, gamma: int, arms: dict[int, Arm], seen: Seen, *, comparable: bool) -> Pair:
    plain, arm = arms[0].rounds, arms[gamma]
    fast = arm.rounds
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
        alpha=arm.accepted / arm.decided if arm.decided else None,
        decided=arm.decided,
        speedup=spread.median,
        speedup_range=(spread.p20, spread.p80),
        identical=arm.identical if comparable else None,
        agreement=seen.agreement,
        experts_ar=seen.experts.get(batch),
        experts_verify=seen.experts.get(batch * (gamma + 1)),
        read_bandwidth=seen.read_bandwidth,
        offload_ar=arms[0].offload,
        offload_spec=arm.offload,
        draft_format=seen.draft_format,
        draft=seen.draft,
        collective_ar=_median(arms[0].collective),
        collective_verify=_median(arm.collective),
    )


def _offload_fields(stats: DecoderStats, before: int | None) -> dict[str, Any]:
    """Reads of a run; ``before``: bytes from storage when it began."""
    assert stats.offload is not None
    after = bytes_from_storage()
    stored = None if before is None or after is None else after - before
    return {**stats.offload.as_dict(), "bytes_from_storage": stored, "rounds": stats.rounds}


def _median(seconds: list[float]) -> float | None:
    return statistics.median(seconds) if seconds else None


def _times(runs: list[list[Round]]) -> RoundTimes:
    median = lambda phase: statistics.median(t.get(phase, 0.0) for run in runs for _, t in run)
    return RoundTimes(*(median(phase) for phase in ("draft", "verify", "sample", "host")))
