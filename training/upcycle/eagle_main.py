"""``python -m training.upcycle.eagle_main``: train the EAGLE-3 head, or go on training it.

Stop it and start it again with another ``--target`` and the same ``--run-dir`` and ``--minutes`` to
go on over that one.
"""

import argparse
import sys
from pathlib import Path

import torch

from training.__main__ import keep_freed_memory

from .eagle_train import Run, Settings


def main(argv: list[str] | None = None) -> int:
    """Train, write the published layout to ``head`` in the run's folder; the exit status."""
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(
        prog="python -m training.upcycle.eagle_main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", type=Path, required=True, help="checkpoint to draft for")
    parser.add_argument("--dense", type=Path, required=True, help="Llama that the head begins as")
    parser.add_argument("--texts", type=Path, required=True, help="texts.pt: token ids by domain")
    parser.add_argument("--run-dir", type=Path, required=True, help="checkpoint, log and result")
    parser.add_argument(
        "--minutes", type=float, default=45.0, help="wall-clock budget (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--passes", type=int, default=1, help="over what was annotated (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    keep_freed_memory()
    torch.set_num_threads(args.threads)

    def model(path: Path):
        loaded = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, trust_remote_code=False, use_safetensors=True
        )
        return loaded.eval().requires_grad_(False).to(args.device)

    texts = torch.load(args.texts, weights_only=True)
    settings = Settings(args.minutes, args.device, args.passes)
    run = Run(model(args.target), model(args.dense), texts, args.run_dir, settings)
    run.train()
    run.export(args.run_dir / "head")
    return 0


if __name__ == "__main__":
    sys.exit(main())
