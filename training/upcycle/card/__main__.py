"""``python -m training.upcycle.card``: every number of the model card, then the card.

Cells go to ``evaluation.jsonl`` in the run directory one by one; a second start measures only what
is not there yet. Then they are put into the record beside the model's assets, from which the card
is written.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from decoder.cli import flag_types as flag
from decoder.model.loading import load_model, load_tokenizer
from decoder.sampling import VERIFIERS
from training import experts
from training.checkpoint import load_checkpoint

from .acceptance import (
    GAMMA,
    PROMPTS,
    ROWS,
    Cell,
    acceptance,
    cells,
    drafters,
    make_decoder,
    read_prompts,
)
from .evaluate import score, windows
from .journal import Journal, digest, fingerprint
from .render import K, render

HOME = Path("decoder/smol")
TOP_KS = (1, 2, 3)
SEPARATOR = "<|endoftext|>"
TEXT_FIELDS = ("prompt", "canonical_solution", "text", "turns")  # of a line of JSON


def outside_texts(named: Sequence[str]) -> dict[str, list[str]]:
    """Documents by name that no training text was taken from.

    Args:
        named: ``NAME=PATH`` each: a text, or JSON lines as those of HumanEval and MT-bench.

    Returns:
        These, and two that every installation has: Python's language reference, of which training
        takes nothing (it reads docstrings), and C++, of which it never sees any.
    """
    from pydoc_data.topics import topics

    headers = sorted((Path(torch.__file__).parent / "include" / "c10").rglob("*.h"))
    texts = {
        "language reference": [text for _, text in sorted(topics.items())],
        "C++": [path.read_text(encoding="utf-8") for path in headers],
    }
    for name, _, path in (each.partition("=") for each in named):
        texts[name] = list(_documents(Path(path)))
    return texts


def _documents(path: Path) -> Iterator[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        if ".jsonl" not in path.suffixes:
            yield file.read()
            return
        for line in map(json.loads, file):
            found = [line[key] for key in TEXT_FIELDS if key in line]
            yield "".join(t if isinstance(t, str) else "\n\n".join(t) for t in found)


def measure_losses(
    journal: Journal,
    path: Path,
    texts: Mapping[tuple[str, str], torch.Tensor],
    asked: Iterable[tuple[tuple[str, str], int | None]],
    device: str,
) -> None:
    """Loss cells of one model, with the load of its experts; it is loaded if one is missing.

    Args:
        texts: windows ``[N, WINDOW + 1]`` by part and domain.
        asked: which of them at how many experts per token; ``None`` for a dense model.
    """
    name = experts.register()
    load = functools.cache(
        lambda: load_model(path, dtype=torch.float32, device=device, experts=name)
    )
    weights = fingerprint(path)
    for (part, domain), top_k in asked:
        rows = texts[part, domain]
        what = {
            "kind": "loss",
            "weights": weights,
            "part": part,
            "domain": domain,
            "text": digest(rows.tolist()),
            "tokens": rows[:, 1:].numel(),
            "top_k": top_k,
        }
        journal.cell(what, lambda rows, top_k: score(load(), rows, top_k), rows, top_k)


def measure_acceptance(
    journal: Journal,
    path: Path,
    drafts: Mapping[str, Path],
    prompts: Path,
    new_tokens: int,
    device: str,
) -> None:
    """Acceptance cells of every drafter on the target, which is loaded if one is missing.

    Args:
        drafts: folders of drafts by the drafter's name.
        prompts: their file; see ``acceptance``.
        new_tokens: at most this many per prompt.
    """
    tokenizer = load_tokenizer(path)
    texts = read_prompts(prompts, tokenizer)
    target = functools.cache(lambda: load_model(path, device=device))
    weights = {name: fingerprint(folder) for name, folder in {"target": path, **drafts}.items()}

    def measure(cell: Cell) -> dict[str, Any]:
        longest = max(map(len, texts[cell.domain]))
        # One for each cell: a drafter may learn from what was decoded before.
        decoder = make_decoder(
            *(target(), cell.drafter, drafts.get(cell.drafter), cell.verifier, tokenizer),
            max_length=longest + new_tokens,
        )
        return acceptance(decoder, texts[cell.domain], cell.temperature, new_tokens)

    for cell in cells(drafters(drafts), list(texts)):
        what = {
            "kind": "acceptance",
            "weights": [weights["target"], weights.get(cell.drafter)],
            **cell._asdict(),
            "prompts": digest(texts[cell.domain]),
            "gamma": GAMMA,
            "rows": ROWS,
            "new_tokens": new_tokens,
        }
        journal.cell(what, measure, cell)


def training_facts(run_dir: Path) -> dict[str, Any]:
    """What the stages of training wrote down about themselves, by the names of their files."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(run_dir.glob("*.json"))}


def stated_alphas(measured: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Acceptance as the demonstration reads it: by drafter, domain and temperature (``"0"``).

    That of the usual verifier, to forecast what a run will bring.
    """
    table: dict[str, dict[str, dict[str, float]]] = {}
    for cell in measured:
        if cell["kind"] == "acceptance" and cell["verifier"] == VERIFIERS[0]:
            of_domain = table.setdefault(cell["drafter"], {}).setdefault(cell["domain"], {})
            of_domain[f"{cell['temperature']:g}"] = cell["alpha"]
    return table


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write JSON with one key to a line: most of it is thousands of counts."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def evaluation(args: argparse.Namespace) -> dict[str, Any]:
    """All cells, of which those that the journal does not have are measured, and the versions."""
    tokenizer = load_tokenizer(args.target)
    separator = tokenizer.convert_tokens_to_ids(SEPARATOR)
    held_out = load_checkpoint(args.run_dir / "texts.pt")["held_out"]
    outside = {
        name: [tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
        for name, documents in outside_texts(args.outside).items()
    }
    texts = {
        (part, domain): windows(documents, separator, args.windows)
        for part, domains in (("held_out", held_out), ("outside", outside))
        for domain, documents in domains.items()
    }
    journal = Journal(args.run_dir / "evaluation.jsonl")
    measure_losses(journal, args.dense, texts, [(text, None) for text in texts], args.device)
    asked = [(text, k) for text in texts for k in (TOP_KS if text[0] == "held_out" else (K,))]
    measure_losses(journal, args.target, texts, asked, args.device)
    drafts = {"independent": args.draft} | ({"eagle": args.eagle} if args.eagle else {})
    measure_acceptance(journal, args.target, drafts, args.prompts, args.new_tokens, args.device)
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"device": args.device, "versions": versions, "cells": journal.cells}


def main(argv: list[str] | None = None) -> int:
    """Measure, write record and card; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.upcycle.card",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run-dir", type=Path, default=Path("outputs/upcycle"))
    parser.add_argument("--target", type=Path, help="default: the built model")
    parser.add_argument("--dense", type=Path, help="default: the model it was made from")
    parser.add_argument("--draft", type=Path, help="default: the built one")
    parser.add_argument("--eagle", type=Path, help="default: the built head, if there is one")
    parser.add_argument(
        "--outside", action="append", default=[], metavar="NAME=PATH", help="another text, unseen"
    )
    parser.add_argument(
        "--windows", type=flag.whole(2, flag.MAX_COUNT), default=8, help="per text (default: 8)"
    )
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="default: the built-in ones")
    parser.add_argument(
        "--new-tokens", type=flag.positive, default=128, help="default: %(default)s"
    )
    parser.add_argument("--device", type=flag.device, default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--threads", type=flag.threads, default=2, help="CPU threads (default: %(default)s)"
    )
    parser.add_argument("--record", type=Path, default=HOME / "assets" / "upcycle.json")
    parser.add_argument("--card", type=Path, default=HOME / "MODEL_CARD.md")
    args = parser.parse_args(argv)
    from decoder import smol
    from training.upcycle.install import dense_path

    args.target = args.target or smol.target_path()
    args.dense = args.dense or dense_path()
    args.draft = args.draft or smol.draft_path()
    if args.eagle is None and smol.has_eagle():
        args.eagle = smol.eagle_path()
    torch.set_num_threads(args.threads)
    record = json.loads(args.record.read_text()) if args.record.exists() else {}
    measured = evaluation(args)
    record |= {"training": training_facts(args.run_dir), "evaluation": measured}
    record["alpha"] = stated_alphas(measured["cells"])
    write_record(args.record, record)
    args.card.write_text(render(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
