"""``bench auto``: automatic gamma against autoregressive decoding and every fixed gamma.

One engine, the replay drafter at each alpha with a real draft's cost. The controller takes its
start-up profile before the first run, as the command line does. The first run is not timed, so a
timed one starts with the acceptance seen before; ``--cold`` forgets it before every run. A second
autoregressive decoder runs along: its ratio to the first is the noise of the machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.commands.arguments import numbers
from bench.measure.record import Recorder
from bench.measure.timer import interleaved, summarize
from bench.runs.decode import Subject, drafter_for
from bench.workloads.models import load_subject
from bench.workloads.prompts import random_prompts
from decoder import SamplingParams, SpeculativeDecoder
from decoder.engine.profile_rounds import profile_rounds
from decoder.gamma.acceptance import AcceptanceEstimator
from decoder.gamma.auto import AutoGamma

PROMPT_TOKENS = 32
TWIN = "0 again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench auto``."""
    parser.add_argument("--target", default="moe-310m", help="moe-310m, dense-310m, or a path")
    parser.add_argument("--alphas", default="0.3,0.6,0.9")
    parser.add_argument("--batch-sizes", default="1,2,4,8,16,32,64")
    parser.add_argument("--gammas", default="1,2,4,6", help="fixed gammas to compare with")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=16, help="most rounds per cell")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of rounds per cell")
    parser.add_argument("--cold", action="store_true", help="acceptance unknown in every run")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--out", help="append JSON lines to this file")


def run(args: argparse.Namespace) -> None:
    """Measure every (alpha, B), print ratios, append lines to ``--out``."""
    if args.threads:
        torch.set_num_threads(args.threads)
    recorder = Recorder(args.out, args.device)
    target, draft = load_subject(args.target, None, getattr(torch, args.dtype), args.device)
    table = Table(title=f"{args.target} {args.dtype}: automatic gamma")
    heads = ("alpha", "B", "AR / AR", "auto / AR", "best fixed", "auto / best of all", "why")
    for head in heads:
        table.add_column(head, justify="right")
    for batch in tqdm(numbers(args.batch_sizes), desc="B", disable=None):
        for alpha in map(float, args.alphas.split(",")):
            line = _measure(args, Subject(target, draft, alpha), batch)
            recorder.write("auto", target=args.target, alpha=alpha, batch=batch, **line)
            table.add_row(
                f"{alpha:g}",
                str(batch),
                f"{line['noise']:.2f}",
                f"{line['against_ar']:.2f}",
                str(line["best_fixed"]),
                f"{line['against_best']:.2f}",
                line["why"],
            )
    Console(width=150).print(table)


def _measure(args: argparse.Namespace, subject: Subject, batch: int) -> dict[str, Any]:
    """Ratios of one cell, round by round."""
    prompts = random_prompts(batch, PROMPT_TOKENS, subject.target.config.vocab_size)
    params = SamplingParams(max_new_tokens=args.new_tokens, ignore_eos=True)
    gammas = numbers(args.gammas)
    length = PROMPT_TOKENS + args.new_tokens
    size = {"max_batch_size": batch, "max_length": length}
    decoders = {name: SpeculativeDecoder(subject.target, None, 0, **size) for name in ("0", TWIN)}
    answers = [list(o.token_ids) for o in decoders["0"].generate(prompts, params)]
    for gamma in [*map(str, gammas), "auto"]:
        drafter = drafter_for(subject)
        drafter.recordings.update({tuple(p): a for p, a in zip(prompts, answers, strict=True)})
        wanted: Any = gamma if gamma == "auto" else int(gamma)
        decoders[gamma] = SpeculativeDecoder(subject.target, drafter, wanted, **size)
    profiled = profile_rounds(decoders["auto"])

    def timed(name: str) -> Callable[[int], float]:
        def one(_round: int) -> float:
            decoder = decoders[name]
            controller = decoder.controller
            if args.cold and isinstance(controller, AutoGamma):
                controller.acceptance = AcceptanceEstimator(controller.max_gamma)
            begin = time.perf_counter()
            outputs = decoder.generate(prompts, params)
            seconds = time.perf_counter() - begin
            if [list(o.token_ids) for o in outputs] != answers:
                raise RuntimeError(f"gamma {name} changed the output at B={batch}")
            return seconds

        return one

    samples = interleaved(
        {name: timed(name) for name in decoders}, rounds=args.rounds, budget_s=args.budget
    )
    medians = {name: summarize(seconds).median for name, seconds in samples.items()}
    fixed = min(("0", *map(str, gammas)), key=medians.__getitem__)

    def ratio(name: str, other: str = "auto") -> float:
        """Median over rounds of the seconds of ``name`` over those of ``other``."""
        pairs = zip(samples[name], samples[other], strict=True)
        return summarize([a / b for a, b in pairs]).median

    return {
        "seconds": medians,
        "rounds": len(samples["0"]),
        "best_fixed": int(fixed),
        "noise": ratio("0", TWIN),
        "against_ar": ratio("0"),
        "against_best": ratio(fixed),
        "profiled": profiled,
        "cold": args.cold,
        "new_tokens": args.new_tokens,
        "why": decoders["auto"].controller.explain(),
    }
