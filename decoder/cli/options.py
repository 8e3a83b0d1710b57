"""Flags shared by the sub-commands, under the names people know, and what is built from them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any, NoReturn

from decoder.errors import UserError
from decoder.requests.params import SamplingParams

DRAFTER_NAMES = {
    "auto": "auto",
    "independent": "independent",
    "draft_model": "independent",
    "eagle": "eagle",
    "eagle3": "eagle",
    "ngram": "ngram",
    "self": "self",
    "replay": "replay",
    "none": "none",
}

# vLLM's keys of --speculative-config, and the flag each one sets.
_SPECULATIVE_KEYS = {
    "method": "drafter",
    "model": "draft",
    "num_speculative_tokens": "gamma",
    "prompt_lookup_max": "prompt_lookup_max",
    "prompt_lookup_min": "prompt_lookup_min",
    "rejection_sample_method": "verifier",
}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Target, drafter, and how to run them."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--target", "--model", metavar="PATH", help="target model (default: the embedded one)"
    )
    group.add_argument(
        "--draft", "--draft-model", "--assistant-model", "--spec-model",
        "--speculative-draft-model-path", metavar="PATH", dest="draft",
        help="draft model or EAGLE head (default with the embedded target: its draft)",
    )  # fmt: skip
    group.add_argument(
        "--drafter", "--method", "--spec-method", choices=sorted(DRAFTER_NAMES), default="auto",
        help="who proposes tokens; auto: --draft if given, else n-gram lookup",
    )  # fmt: skip
    group.add_argument(
        "--gamma", "--num-speculative-tokens", "--spec-tokens", "--num-assistant-tokens",
        type=_gamma, default="auto", metavar="N|auto", help="draft length",
    )  # fmt: skip
    group.add_argument("--max-gamma", type=_positive, default=8, help="longest that auto considers")
    group.add_argument(
        "--verifier", "--rejection-sample-method", choices=("standard", "block", "coupled"),
        default="standard", help="how drafts are accepted",
    )  # fmt: skip
    group.add_argument("--prompt-lookup-max", type=_positive, default=4, metavar="N")
    group.add_argument("--prompt-lookup-min", type=_positive, default=2, metavar="N")
    group.add_argument(
        "--self-draft-top-k", type=_positive, metavar="K", help="experts per token for self drafts"
    )
    group.add_argument(
        "--replay-alpha", type=float, default=0.9, metavar="A",
        help="acceptance that --drafter replay simulates; --draft runs for its cost alone",
    )  # fmt: skip
    group.add_argument(
        "--speculative-config", type=_speculative_config, metavar="JSON", help="in vLLM's keys"
    )
    _add_machine_arguments(parser)


def _add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    from decoder.model.loading import DTYPES

    group = parser.add_argument_group("machine")
    group.add_argument("--batch-size", "--max-num-seqs", type=_positive, default=16, metavar="B")
    group.add_argument("--max-length", "--max-model-len", type=_positive, metavar="N")
    group.add_argument("--dtype", choices=sorted(DTYPES), default="auto")
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda when there is one)")
    group.add_argument("--threads", type=_positive, help="CPU threads")
    group.add_argument(
        "--experts-implementation", default="moesd", metavar="NAME",
        help="moesd (default) or one of transformers' own, which also turns our dense kernels off",
    )  # fmt: skip
    group.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    group.add_argument(
        "--attention", "--attn-implementation", choices=("auto", "portable"), default="auto"
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per field of ``SamplingParams``, with its default."""
    default = SamplingParams()
    group = parser.add_argument_group("sampling")
    for name in ("temperature", "top-p", "min-p"):
        group.add_argument(
            f"--{name}", type=float, default=getattr(default, name.replace("-", "_"))
        )
    group.add_argument("--top-k", type=int, default=default.top_k)
    for name in ("repetition", "presence", "frequency"):
        flag = f"--{name}-penalty"
        group.add_argument(flag, type=float, default=getattr(default, f"{name}_penalty"))
    group.add_argument("--logit-bias", type=_logit_bias, metavar="JSON", help='{"token id": bias}')
    group.add_argument(
        "--max-new-tokens", "--max-tokens", type=int, default=default.max_new_tokens, metavar="N"
    )
    group.add_argument("--min-new-tokens", "--min-tokens", type=int, default=0, metavar="N")
    group.add_argument("--seed", type=int, default=default.seed)
    group.add_argument("--stop", action="append", default=[], metavar="TEXT")
    group.add_argument("--stop-token-ids", type=int, nargs="+", default=[], metavar="ID")
    group.add_argument("--ignore-eos", action="store_true")
    group.add_argument("--logprobs", type=int, metavar="N")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The parameters that the flags describe.

    Raises:
        UserError: a value out of range.
    """
    names = SamplingParams.__dataclass_fields__
    values = {name: getattr(args, name) for name in names}
    values["stop"] = tuple(values["stop"])
    values["stop_token_ids"] = tuple(values["stop_token_ids"])
    try:
        return SamplingParams(**values)
    except ValueError as error:
        raise UserError(str(error)) from None


class Setup:
    """Loaded target, tokenizer and drafter choice; makes any number of decoders on one target."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from transformers.utils.logging import disable_progress_bar

        from decoder.model.loading import DTYPES, load_model, load_tokenizer

        disable_progress_bar()
        self.args = args
        if args.threads:
            torch.set_num_threads(args.threads)
        path = args.target
        if path is None:
            path = embedded_path("target")
            if args.draft is None and args.drafter in ("auto", "independent", "draft_model"):
                args.draft = embedded_path("draft")
            elif args.draft is None and args.drafter in ("eagle", "eagle3"):
                args.draft = embedded_path("eagle")
        self.tokenizer = load_tokenizer(path)
        self.target = load_model(
            path,
            dtype=DTYPES[args.dtype],
            device=args.device,
            experts=None if self.kernels else args.experts_implementation,
        )

    @property
    def kernels(self) -> bool:
        """Whether ``moesd_kernels`` runs the models."""
        return self.args.experts_implementation == "moesd"

    def decoder(self, *, plain: bool = False) -> Any:
        """A decoder as the flags describe, or one that only decodes autoregressively."""
        from decoder.engine.loop import SpeculativeDecoder
        from decoder.engine.profile_rounds import profile_rounds

        args = self.args
        decoder = SpeculativeDecoder(
            self.target,
            None if plain else self.drafter(),
            args.gamma,
            args.verifier,
            tokenizer=self.tokenizer,
            max_batch_size=args.batch_size,
            max_length=args.max_length,
            max_gamma=args.max_gamma,
            kernels=self.kernels,
            attention=args.attention,
            static=False if args.enforce_eager else "auto",
        )
        profile_rounds(decoder)
        return decoder

    def drafter(self) -> Any:
        """The drafter that the flags describe."""
        from decoder.drafters import ReplayDrafter, build_drafter

        args = self.args
        kind = DRAFTER_NAMES[args.drafter]
        if kind in ("independent", "eagle") and args.draft is None:
            raise UserError(f"--drafter {args.drafter} needs --draft, got none")
        needs_path = kind in ("independent", "eagle", "replay") or (kind == "auto" and args.draft)
        spec = args.draft if needs_path else ("ngram" if kind == "auto" else kind)
        drafter = build_drafter(
            spec,
            self.target,
            self.tokenizer,
            kind=kind if kind in ("independent", "eagle") else "auto",
            self_top_k=args.self_draft_top_k,
            max_ngram=args.prompt_lookup_max,
            min_ngram=min(args.prompt_lookup_min, args.prompt_lookup_max),
            kernels=self.kernels,
        )
        if kind != "replay":
            return drafter
        return ReplayDrafter(args.replay_alpha, cost=drafter if args.draft else None)


def embedded_path(part: str) -> str:
    """Directory of a part of the embedded pair: ``"target"``, ``"draft"`` or ``"eagle"``.

    Raises:
        UserError: the package was installed without it.
    """
    from decoder import embedded

    find = {"target": embedded.target_path, "draft": embedded.draft_path}
    try:
        return str(find.get(part, embedded.eagle_path)())
    except FileNotFoundError as error:
        raise UserError(str(error)) from None


def _gamma(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected auto or an integer >= 0, got {text!r}")
    return value


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return value


def _logit_bias(text: str) -> dict[int, float]:
    try:
        return {int(token): float(bias) for token, bias in json.loads(text).items()}
    except (ValueError, AttributeError, TypeError):
        raise argparse.ArgumentTypeError(
            f'expected JSON like {{"17": -1.5}}, got {text!r}'
        ) from None


def _speculative_config(text: str) -> dict[str, Any]:
    try:
        config = dict(json.loads(text))
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}") from None
    for key in config:
        if key not in _SPECULATIVE_KEYS:
            known = ", ".join(_SPECULATIVE_KEYS)
            raise argparse.ArgumentTypeError(f"unknown key {key!r}; known: {known}")
    return config


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, then let ``--speculative-config`` set the flags that its keys name."""
    args = parser.parse_args(argv)
    config = getattr(args, "speculative_config", None)
    for key, value in (config or {}).items():
        # Through the parser once more: the same checks and the same messages as for flags.
        flag = "--" + _SPECULATIVE_KEYS[key].replace("_", "-")
        checked = OneLineParser(prog=parser.prog, add_help=False)
        add_model_arguments(checked)
        name = _SPECULATIVE_KEYS[key]
        setattr(args, name, getattr(checked.parse_args([flag, str(value)]), name))
    return args
