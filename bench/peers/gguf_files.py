"""``python -m bench.peers.gguf_files MODEL FILE``: a model of ours as files for llama.cpp.

MODEL is a trained pair's name, ``moe-310m`` or a folder. Each of ``--types`` becomes a file of its
own beside FILE, made by llama.cpp's ``llama-quantize``, all its matrices alike (``--pure``). Where
a matrix's rows are no multiple of a type's block it takes another type; which, is printed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gguf.writer import write_gguf
from bench.workloads.models import moe_310m, random_model
from decoder.builtin import BUILTIN
from decoder.model.loading import load_model, load_tokenizer

RANDOM = "moe-310m"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files and say what is in them; returns the process exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.gguf_files", description=__doc__)
    parser.add_argument("model", help=f"{', '.join(BUILTIN)}, {RANDOM}, or a folder")
    parser.add_argument("file", type=Path, help="the bf16 file, such as smol-bf16.gguf")
    parser.add_argument("--types", default="", help="for example Q8_0,Q4_0,Q4_K")
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama-quantize, for --types")
    args = parser.parse_args(argv)
    types = [name for name in args.types.split(",") if name]
    if types and args.llama_cpp is None:
        parser.error("--types needs --llama-cpp FOLDER")
    try:
        model, tokenizer = load(args.model)
        tokens = "" if write_gguf(model, args.file, tokenizer) else ", token ids only"
        print(f"{args.file}: {args.file.stat().st_size / 1e9:.2f} GB{tokens}")
        for name in types:
            target = quantised_file(args.file, name)
            stored = quantize(args.llama_cpp, args.file, target, name)
            print(f"{target}: {target.stat().st_size / 1e9:.2f} GB, matrices {stored}")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"python -m bench.peers.gguf_files: {error}", file=sys.stderr)
        return 2
    return 0


def load(name: str) -> tuple[Any, Any | None]:
    """A model in bf16 and its tokenizer; a random one has none."""
    if name == RANDOM:  # llama.cpp always has the weights of a token's experts sum to one
        return random_model(moe_310m(norm_topk_prob=True)), None
    folder = BUILTIN[name].target_path() if name in BUILTIN else Path(name)
    return load_model(folder, dtype=torch.bfloat16, device="cpu"), load_tokenizer(folder)


def quantised_file(file: Path, name: str) -> Path:
    """``smol-bf16.gguf`` and ``Q4_0`` make ``smol-q4_0.gguf``."""
    return file.with_name(f"{file.stem.removesuffix('-bf16')}-{name.lower()}.gguf")


def quantize(folder: Path, source: Path, target: Path, name: str) -> str:
    """Run ``llama-quantize`` and count what it stored, ``"q4_K 60, q5_0 181"``.

    Raises:
        RuntimeError: it failed, with its last line.
    """
    command = [str(folder / "llama-quantize"), "--pure", str(source), str(target), name]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        last = done.stdout.strip().rpartition("\n")[2]
        raise RuntimeError(f"llama-quantize ended with exit code {done.returncode}: {last}")
    kinds = Counter(re.findall(r"converting to (\w+)", done.stdout))
    return ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))


if __name__ == "__main__":
    raise SystemExit(main())
