"""What the ranks of ``tests/decoder/parallel`` do; it has to be importable in each of them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import DraftOptions, build_drafter
from decoder.errors import RankLost, UserError
from decoder.parallel.collectives import clock, summed
from decoder.parallel.group import Ranks
from decoder.parallel.loading import load_part
from decoder.parallel.runner import lead
from decoder.parallel.worker import serve
from moesd_kernels import accelerate

from .processes import report

# The last with its positions is longer than one message.
PROMPTS = [[7, 8, 9, 7, 8], [3, 4, 3, 4, 3, 4, 3], [1 + place % 60 for place in range(250)]]
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
COUPLED = SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=1.0, seed=3)


def decoded(model: Any, drafter: str = "none", gamma: Any = 0, draft: Any = None) -> list[Any]:
    """Tokens by prompt, greedy and sampled in turn, with rows that are refilled."""
    options = DraftOptions(kernels=True)
    decoder = SpeculativeDecoder(
        model, build_drafter(drafter, model, draft, options), gamma, "coupled", max_batch_size=3
    )
    params = [GREEDY, COUPLED] * len(PROMPTS)
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    return [output.token_ids for output in decoder.generate(prompts, params)]


def decode(cases: list[tuple[Any, ...]], draft: str, folder: Path) -> None:
    """Decode with each (mode, path of a target, dtype, drafters with gammas); rank 0 reports."""
    ranks, found = Ranks(timeout=60), []
    for mode, path, dtype, drafters in cases:
        model = load_part(path, mode, ranks, dtype=dtype)
        if ranks.rank:
            serve(model, ranks)
            continue
        leader = lead(model, ranks)
        for name, gamma in drafters:
            own = draft if name == "independent" else None
            found.append(decoded(model, name, gamma, own))
        leader.end()
    report(folder, ranks.rank, outputs=found, collectives=clock.calls)


def sums(folder: Path) -> None:
    """Sum random parts; report whether bits are those of a sum in order, of all rows and of one."""
    ranks, right = Ranks(), []
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(1)
        parts = torch.randn(ranks.size, 37, 33, generator=generator).to(dtype)
        expected = parts[0].float()
        for part in parts[1:]:
            expected = expected + part.float()
        own = parts[ranks.rank]
        right.append(torch.equal(summed(own), expected.to(dtype)))
        right.append(torch.equal(summed(own[:1]), expected[:1].to(dtype)))
    report(folder, ranks.rank, right=right)


def count_expert_work(path: str, folder: Path) -> None:
    """Report the multiplications of one layer's experts here, and of each share of its routing."""
    ranks = Ranks()
    model = load_part(path, "expert", ranks, dtype=torch.float32, kernels=False)
    accelerate(model, backend="torch")  # whose products can be counted
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.rand(24, 8, generator=torch.Generator().manual_seed(1)).topk(4, dim=1).indices
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        experts(x, ids, torch.full((24, 4), 0.25))
    held, width = experts.down_proj.shape[0], experts.down_proj.shape[2]
    pairs = int((ids // held == ranks.rank).sum())
    per_pair = 2 * 32 * 2 * width + 2 * width * 32
    report(folder, ranks.rank, flops=counter.get_total_flops(), expected=pairs * per_pair)


def decode_in_threads(path: str, folder: Path) -> None:
    """Two decoders on one target at once; report whether each decodes what one does alone."""
    ranks = Ranks(timeout=20)
    model = load_part(path, "expert", ranks, dtype=torch.float32)
    if ranks.rank:
        serve(model, ranks)
        return
    leader = lead(model, ranks)
    alone = decoded(model)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(decoded, model, "ngram", gamma) for gamma in (2, 3)]
    report(folder, 0, right=[one.result() == alone for one in both])
    leader.end()


def interrupt_in_forward(path: str, folder: Path) -> None:
    """Rank 0 is interrupted between two sums of a forward, and tries to go on."""
    ranks = Ranks(timeout=20)
    model = load_part(path, "expert", ranks, dtype=torch.float32)
    said = []
    try:
        if ranks.rank:
            serve(model, ranks)
        else:
            lead(model, ranks)
            calls = iter(range(100))

            def interrupt(*_: Any) -> None:
                if next(calls) == 12:
                    raise KeyboardInterrupt

            model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
            for _ in range(2):
                try:
                    decoded(model, "ngram", 2)
                except (KeyboardInterrupt, RankLost) as error:
                    said.append(f"{type(error).__name__}: {error}")
    except RankLost as lost:
        said.append(str(lost))
    report(folder, ranks.rank, said=said)


def fail_in_forward(path: str, folder: Path) -> None:
    """Rank 1 runs out of memory in its third forward."""
    ranks = Ranks(timeout=20)
    model = load_part(path, "expert", ranks, dtype=torch.float32)
    if ranks.rank == 1:
        calls = iter(range(100))

        def fail(*_: Any) -> None:
            if next(calls) == 12:
                raise MemoryError("no room for 3 GiB")

        model.model.layers[0].mlp.register_forward_pre_hook(fail)
    try:
        if ranks.rank:
            serve(model, ranks)
        else:
            lead(model, ranks)
            decoded(model, "ngram", 2)
    except RankLost as lost:
        report(folder, ranks.rank, lost=str(lost))


def fail_to_load(path: str, folder: Path, how: str) -> None:
    """Rank 1 dies while the others load, or finds no model where they do."""
    ranks = Ranks(timeout=20)
    if ranks.rank == 1 and how == "dies":
        os._exit(0)
    try:
        load_part(path if ranks.rank == 0 else f"{path}-not", "expert", ranks)
    except (RankLost, UserError) as error:
        report(folder, ranks.rank, lost=f"{type(error).__name__}: {error}")


def run_command(*arguments: str) -> int:
    """A command line of the decoder's."""
    from decoder.__main__ import main

    return main(arguments)


def differ(folder: Path) -> None:
    """Ranks that are not alike."""
    ranks = Ranks()
    try:
        ranks.require_same({"instruction set": f"isa{min(ranks.rank, 1)}"})
    except ValueError as error:
        report(folder, ranks.rank, said=str(error))
    dist.barrier()
