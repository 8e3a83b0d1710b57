"""vLLM's schedulers with the draft length of every step chosen from measured steps and acceptance.

Whatever is drafted, what vLLM accepts is its own business: the length changes no output. Which
speculative methods can do with another length from step to step was read in vLLM's proposers.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from decoder.gamma.auto import AutoGamma

from .rounds import StepGamma
from .versions import logger, supported

METHODS = ("ngram", "draft_model", "eagle", "eagle3", "mtp")
TABLE = "num_speculative_tokens_per_batch_size"


class _ChoosesGamma:
    """What stands before a scheduler of vLLM's: it answers for the length and times the steps."""

    dynamic_sd_lookup: Any

    def __init__(self, lengths: list[int], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.choose_by(StepGamma(AutoGamma(max(lengths)), lengths))
        self._ended: float | None = None  # when the step before did; None after a pause

    def choose_by(self, gamma: StepGamma) -> None:
        """Have lengths chosen by another; not while a step is under way."""
        self.dynamic_sd_lookup = self._gamma = gamma

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take note of the step, then do as vLLM does."""
        if scheduler_output.total_num_scheduled_tokens:
            self._note(scheduler_output, model_runner_output, time.perf_counter())
        outputs = super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )
        if not self.has_unfinished_requests():  # type: ignore[attr-defined]
            self._ended = None
        return outputs

    def _note(self, scheduled: Any, output: Any, now: float) -> None:
        before, self._ended = self._ended, now
        verified = scheduled.scheduled_spec_decode_tokens
        drafted = {name: len(verified.get(name, ())) for name in scheduled.num_scheduled_tokens}
        # A sequence that decodes has its last token and what was drafted after it.
        decoding = all(n == 1 + drafted[name] for name, n in scheduled.num_scheduled_tokens.items())
        if before is None or not decoding or not output.sampled_token_ids:
            self._gamma.ended_otherwise()
            return
        rows = [output.req_id_to_index[name] for name in drafted]
        accepted = [max(len(output.sampled_token_ids[row]) - 1, 0) for row in rows]
        self._gamma.ended(now - before, list(drafted.values()), accepted)
        logger.debug("moesd: %s", self._gamma.controller.explain())


class GammaScheduler(_ChoosesGamma, Scheduler):
    """vLLM's scheduler that waits for a step before it schedules the next: the one on CPUs."""


class AsyncGammaScheduler(_ChoosesGamma, AsyncScheduler):
    """vLLM's scheduler that is a step ahead, the one on GPUs. Not run on a GPU yet."""


def draft_lengths(vllm_config: Any) -> list[int]:
    """The draft lengths that may be chosen.

    Raises:
        ValueError: none may; the message says why, as the end of a sentence.
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        raise ValueError("no --speculative-config is given")
    if speculative.method not in METHODS or speculative.parallel_drafting:
        parallel = " with parallel drafting" if speculative.parallel_drafting else ""
        raise ValueError(
            f"expected one of {', '.join(METHODS)}, got {speculative.method}{parallel}, whose "
            "length vLLM cannot change"
        )
    if speculative.use_gemma4_mtp() or speculative.use_step3p5_mtp():
        raise ValueError("this model's own proposer cannot do without drafts")
    if vllm_config.parallel_config.data_parallel_size > 1:
        raise ValueError("ranks of data parallelism would draft different numbers of tokens")
    longest = speculative.num_speculative_tokens
    table = getattr(speculative, TABLE)
    if table:
        lengths = sorted({min(length, longest) for _, _, length in table})
        if len(lengths) == 1:
            raise ValueError(f"{TABLE} lists {lengths[0]} alone")
        return lengths
    if vllm_config.device_config.device_type == "cpu":
        return list(range(longest + 1))
    raise ValueError(f"{TABLE} does not list them, and graphs are captured for those it lists")


def make_scheduler(**arguments: Any) -> Scheduler:
    """One of the two above, or vLLM's own and one line in the log that says why."""
    config = arguments["vllm_config"]
    ahead = config.scheduler_config.async_scheduling
    theirs = AsyncScheduler if ahead else Scheduler
    if not supported("draft lengths"):
        return theirs(**arguments)
    try:
        lengths = draft_lengths(config)
    except ValueError as error:
        logger.warning("moesd: draft lengths stay vLLM's own: %s", error)
        return theirs(**arguments)
    logger.info(
        "moesd: of %s tokens drafted by %s, as many as pay are chosen for every step",
        ", ".join(map(str, lengths)),
        config.speculative_config.method,
    )
    ours = AsyncGammaScheduler if ahead else GammaScheduler
    return ours(lengths=lengths, **arguments)
