"""``python -m training <stage>``: data, target, teacher, draft, eagle, evaluate, install; or all.

``mtp`` is a stage of its own: a multi-token-prediction head, after ``teacher``. With ``--assets``
these two, and ``evaluate``, take the pair saved there.

Stages pass their results on through ``--run-dir``; a stage that was interrupted is simply run
again. ``--minutes`` is the wall-clock budget of the stage (of everything with ``all``);
``--tokens`` instead of it makes a stage's schedule independent of the machine's speed.
"""

import argparse
import contextlib
import ctypes
import json
import shutil
import sys
from pathlib import Path

import torch

from decoder.cli import flag_types as flag
from decoder.embedded import ASSETS
from training.checkpoint import load_checkpoint, save_checkpoint
from training.data import build_corpus
from training.optim import Budget
from training.tokenizer import encode, train_tokenizer

MINUTES = flag.number(0.001, 10**6)  # as a flag
# Shares of the minutes of `all`.
SHARES = {"target": 0.60, "teacher": 0.10, "draft": 0.17, "eagle": 0.13}
ALONE = ["mtp"]  # not part of `all`
STAGES = ["data", *SHARES, "evaluate", "install"]
PARTS = ("target", "draft", "eagle", "tokenizer")  # of what is installed


def load_tokens(run_dir: Path):
    """Build (or read back) tokenizer and encoded corpus."""
    from transformers import AutoTokenizer

    cached = run_dir / "tokens.pt"
    if not cached.exists():
        corpus = build_corpus()
        train_tokenizer(corpus, run_dir / "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(run_dir / "tokenizer", trust_remote_code=False)
        tokens = encode(tokenizer, corpus)
        counts = {f"{p}_{k}_tokens": sum(map(len, tokens[p][k])) for p in tokens for k in tokens[p]}
        (run_dir / "corpus.json").write_text(json.dumps({**corpus.summary(), **counts}, indent=1))
        save_checkpoint(tokens, cached)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "tokenizer", trust_remote_code=False)
    for trace in ("is_local", "local_files_only"):  # of where it was loaded from; would be saved
        tokenizer.init_kwargs.pop(trace, None)
    return tokenizer, load_checkpoint(cached)


def run_stage(stage: str, args: argparse.Namespace, tokenizer, tokens) -> None:
    """Run one stage with its budget."""
    from training.draft import train_draft
    from training.eagle import Eagle, save_eagle, train_head
    from training.mtp import Mtp, head_config, save_mtp
    from training.target import save_bf16, train_target
    from training.teacher import build_rows, load_teacher, load_writer

    run_dir = args.run_dir
    if stage == "evaluate":
        results = evaluate_directory(args.assets or run_dir, tokenizer, tokens, args.device)
        print(json.dumps(results, indent=1))
        return
    if stage == "install":
        install(run_dir, ASSETS)
        return
    if stage == "data":
        return
    minutes = args.minutes if args.stage != "all" else args.minutes * SHARES[stage]
    budget = Budget(None if args.tokens else minutes, args.tokens)
    if stage == "target":
        model = train_target(tokens, tokenizer, run_dir, budget, args.device, args.preview)
        save_bf16(model.cpu(), tokenizer, run_dir / "target")
    else:
        path = (args.assets or run_dir) / "target"
        teacher = load_teacher(path, args.device)
        rest = teacher, tokenizer, run_dir, budget, args.device
        if stage == "teacher":
            writer = load_writer(path, args.device)
            build_rows(teacher, writer, tokens, *rest[1:])
        elif stage == "draft":
            embedding = teacher.get_input_embeddings().weight
            model = train_draft(embedding, *rest[1:])
            save_bf16(model.cpu(), tokenizer, run_dir / "draft")
        elif stage == "mtp":
            config = teacher.config
            save_mtp(
                train_head("mtp", lambda: Mtp(head_config(config)), *rest), config, run_dir / "mtp"
            )
        else:
            save_eagle(train_head("eagle", Eagle, *rest), run_dir / "eagle")
    record = {
        "tokens": budget.tokens_done,
        "minutes": round(budget.seconds / 60, 1),
        "device": args.device,
    }
    (run_dir / f"{stage}.json").write_text(json.dumps(record))


def evaluate_directory(path: Path, tokenizer, tokens, device: str = "cpu") -> dict:
    """Evaluate the pair saved under ``path`` (its bf16 weights, computed in fp32)."""
    from transformers import AutoModelForCausalLM

    from training.eagle import load_eagle
    from training.evaluate import evaluate
    from training.mtp import load_mtp
    from training.teacher import load_teacher, load_writer

    draft = None
    if (path / "draft").exists():
        draft = AutoModelForCausalLM.from_pretrained(
            path / "draft", dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
        draft = draft.eval().to(device)
    target = load_teacher(path / "target", device)
    heads = {"eagle": load_eagle(path / "eagle")} if (path / "eagle").exists() else {}
    if (path / "mtp").exists():
        heads["mtp"] = load_mtp(target.config, path / "mtp")
    heads = {name: head.to(device) for name, head in heads.items()}
    return evaluate(target, load_writer(path / "target", device), draft, heads, tokens, tokenizer)


def install(run_dir: Path, assets: Path) -> None:
    """Copy the finished pair into the package: the whole of it, since its parts fit each other.

    Raises:
        FileNotFoundError: a part has not been made; the package is as it was.
    """
    missing = [part for part in PARTS if not (run_dir / part).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{run_dir} must hold {', '.join(PARTS)}, got no {', '.join(missing)}"
        )
    for part in PARTS:
        shutil.copytree(run_dir / part, assets / part, dirs_exist_ok=True)


def keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks: mapping them anew took a third of each step."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # MMAP_MAX, TRIM, TOP_PAD
            libc.mallopt(option, value)


def main(argv: list[str] | None = None) -> int:
    """Run one stage or all; returns the exit status."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(
        prog="python -m training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=["all", *STAGES, *ALONE])
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=Path("outputs/training"),
        help="all results",
    )
    parser.add_argument(
        "--minutes", type=MINUTES, default=60.0, help="wall-clock budget (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=flag.whole(1, 10**12), help="budget of one stage, instead of minutes"
    )
    parser.add_argument("--device", type=flag.device, default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--threads", type=flag.threads, default=2, help="CPU threads (default: %(default)s)"
    )
    parser.add_argument(
        "--preview", type=Path, help="also write the target here at every checkpoint"
    )
    parser.add_argument(
        "--assets",
        type=Path,
        help="directory with target, draft, eagle (default: run dir)",
    )
    args = parser.parse_args(argv)
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    args.run_dir.mkdir(parents=True, exist_ok=True)
    if args.assets:  # a pair trained elsewhere, with its own tokenizer
        tokenizer = AutoTokenizer.from_pretrained(args.assets / "target", trust_remote_code=False)
        tokens = encode(tokenizer, build_corpus())
    else:
        tokenizer, tokens = load_tokens(args.run_dir)
    for stage in STAGES if args.stage == "all" else [args.stage]:
        run_stage(stage, args, tokenizer, tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
