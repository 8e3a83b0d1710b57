"""``python -m training.upcycle <stage>``: answers, texts, target, draft, eagle; or all of them.

Stages pass their results on through ``--run-dir``. Each goes on from where it was stopped, also
with more ``--minutes``, which are its own wall-clock budget over all its parts. ``target``,
``draft`` and ``eagle`` end by writing the package's assets. ``python -m training.upcycle.card``
measures them.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from decoder.cli import flag_types as flag
from training.__main__ import MINUTES, keep_freed_memory
from training.checkpoint import load_checkpoint, save_checkpoint
from training.optim import Budget

# Minutes of `all`, by stage; `texts` only reads.
SHARES = {"answers": 0.15, "texts": 0.0, "target": 0.4, "draft": 0.2, "eagle": 0.25}


def run_stage(stage: str, run_dir: Path, minutes: float, device: str) -> None:
    """Run one stage and leave a record of its budget in ``run_dir``."""
    budget = Budget(minutes, None)
    stages = {"answers": answers, "texts": texts, "target": target, "draft": draft, "eagle": eagle}
    stages[stage](run_dir, budget, device)
    if stage != "texts":
        record = {"tokens": budget.tokens_done, "minutes": round(budget.seconds / 60, 1)}
        (run_dir / f"{stage}.json").write_text(json.dumps(record | {"device": device}))


def answers(run_dir: Path, budget: Budget, device: str) -> None:
    """The dense model's conversations, into ``answers.jsonl``."""
    from decoder.model.loading import load_model, load_tokenizer
    from training.upcycle.answers import Writer, write_answers
    from training.upcycle.install import dense_path
    from training.upcycle.sources import build_sources

    dense = load_model(dense_path(), dtype=torch.bfloat16, device=device)
    writer = Writer(dense, load_tokenizer(dense_path()), build_sources().train["code"])
    write_answers(writer, run_dir / "answers.jsonl", budget)


def texts(run_dir: Path, budget: Budget, device: str) -> None:
    """All token ids, into ``texts.pt``, and what they were read from, into ``sources.json``."""
    from decoder.model.loading import load_tokenizer
    from training.upcycle.install import dense_path
    from training.upcycle.sources import build_sources
    from training.upcycle.texts import build_texts

    sources = build_sources()
    ids = build_texts(sources, run_dir / "answers.jsonl", load_tokenizer(dense_path()))
    save_checkpoint(ids, run_dir / "texts.pt")
    (run_dir / "sources.json").write_text(json.dumps(sources.summary(), indent=1))


def target(run_dir: Path, budget: Budget, device: str) -> None:
    """Differences and routers, into the package's assets."""
    from training.upcycle.install import dense_path, install_target
    from training.upcycle.target import Trainer

    ids = load_checkpoint(run_dir / "texts.pt")
    trainer = Trainer(_model(dense_path(), device), ids["train"], run_dir, budget)
    trainer.train()
    install_target(trainer.checkpoint)


def draft(run_dir: Path, budget: Budget, device: str) -> None:
    """The dense draft's scales, into the package's assets."""
    from decoder.smol import target_path
    from moesd_kernels import accelerate
    from training.upcycle.draft import Trainer
    from training.upcycle.install import dense_path, install_draft

    teacher = accelerate(_model(target_path(), device))
    dense = _model(dense_path(), device)
    trainer = Trainer(dense, teacher, run_dir, budget)
    trainer.train()
    install_draft(trainer.checkpoint, dense.config)


def eagle(run_dir: Path, budget: Budget, device: str) -> None:
    """An EAGLE-3 head for the built target, into the package's assets."""
    from decoder.smol import target_path
    from moesd_kernels import accelerate
    from training.upcycle.eagle.train import Run
    from training.upcycle.install import dense_path, install_eagle

    ids = load_checkpoint(run_dir / "texts.pt")
    built = accelerate(_model(target_path(), device))
    run = Run(built, _model(dense_path(), device), ids, run_dir, budget, device)
    run.train()
    run.export(run_dir / "head")
    install_eagle(run_dir / "head")


def _model(path: Path, device: str):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, trust_remote_code=False, use_safetensors=True
    )
    return model.eval().requires_grad_(False).to(device)


def main(argv: list[str] | None = None) -> int:
    """Run one stage or all; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.upcycle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=["all", *SHARES])
    parser.add_argument("--run-dir", type=Path, default=Path("outputs/upcycle"))
    parser.add_argument(
        "--minutes", type=MINUTES, default=60.0, help="wall-clock budget (default: %(default)s)"
    )
    parser.add_argument("--device", type=flag.device, default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--threads", type=flag.threads, default=2, help="CPU threads (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    # A CPU multiplies denormal numbers, to which small gradients underflow, far more slowly: with
    # them the head's first steps took several times as long.
    torch.set_flush_denormal(True)
    args.run_dir.mkdir(parents=True, exist_ok=True)
    for stage in SHARES if args.stage == "all" else [args.stage]:
        minutes = args.minutes * (SHARES[stage] if args.stage == "all" else 1.0)
        run_stage(stage, args.run_dir, minutes, args.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
