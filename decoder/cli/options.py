"""Flags shared by the sub-commands, under the names people know. ``setup`` builds from them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from decoder.drafters import DRAFTERS, DraftOptions
from decoder.drafters.table import AUTO as DRAFTER_AUTO
from decoder.drafters.table import drafter_names
from decoder.errors import UserError
from decoder.gamma.base import AUTO as GAMMA_AUTO
from decoder.gamma.base import DEFAULT_MAX_GAMMA
from decoder.model.kernels import ATTENTION
from decoder.model.loading import DTYPES
from decoder.requests.params import SamplingParams
from decoder.sampling import VERIFIERS

OURS = "moesd"  # the experts implementation that comes with our other kernels

# vLLM's keys of --speculative-config, and the flag that each one sets.
_SPECULATIVE_FLAGS = {
    "method": "--drafter",
    "model": "--draft",
    "num_speculative_tokens": "--gamma",
    "prompt_lookup_max": "--prompt-lookup-max",
    "prompt_lookup_min": "--prompt-lookup-min",
    "rejection_sample_method": "--verifier",
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
    kinds = ", ".join(
        f"{' or '.join([kind.name, *kind.aliases])} ({kind.summary})" for kind in DRAFTERS.values()
    )
    group.add_argument(
        "--drafter", "--method", "--spec-method", choices=drafter_names(), default=DRAFTER_AUTO,
        metavar="NAME",
        help=f"who proposes tokens: {DRAFTER_AUTO} (--draft if given, else ngram), {kinds}",
    )  # fmt: skip
    group.add_argument(
        "--gamma", "--num-speculative-tokens", "--spec-tokens", "--num-assistant-tokens",
        type=_gamma, default=GAMMA_AUTO, metavar=f"N|{GAMMA_AUTO}", help="draft length",
    )  # fmt: skip
    group.add_argument(
        "--max-gamma", type=positive, default=DEFAULT_MAX_GAMMA, metavar="N",
        help="longest that auto considers",
    )  # fmt: skip
    group.add_argument(
        "--verifier", "--rejection-sample-method", choices=VERIFIERS, default=VERIFIERS[0],
        help="how drafts are accepted",
    )  # fmt: skip
    _add_draft_options(group)
    group.add_argument(
        "--speculative-config", type=_speculative_config, metavar="JSON", help="in vLLM's keys"
    )
    _add_machine_arguments(parser)


def _add_draft_options(group: argparse._ArgumentGroup) -> None:
    """One flag per field of ``DraftOptions`` that a kind of drafter reads, with its default."""
    default = DraftOptions()
    for flag, name, kind, metavar, meaning in (
        ("--prompt-lookup-max", "max_ngram", positive, "N", "most tokens looked up"),
        ("--prompt-lookup-min", "min_ngram", positive, "N", "fewest"),
        ("--ngram-threshold", "ngram_threshold", positive, "N",
         "repeated tokens from which n-gram lookup overrides the drafter"),
        ("--self-draft-top-k", "self_top_k", positive, "K",
         "experts per token while drafting (default: half)"),
        ("--replay-alpha", "replay_alpha", float, "A", "acceptance that is simulated"),
    ):  # fmt: skip
        readers = ", ".join(k.name for k in DRAFTERS.values() if name in k.options)
        group.add_argument(
            flag, dest=name, type=kind, default=getattr(default, name), metavar=metavar,
            help=f"{readers}: {meaning}",
        )  # fmt: skip


def draft_options(args: argparse.Namespace, **given: Any) -> DraftOptions:
    """What the flags say about drafting; ``given``: the fields that have no flag."""
    names = {name for kind in DRAFTERS.values() for name in kind.options}
    options = DraftOptions(**{name: getattr(args, name) for name in names}, **given)
    return replace(options, min_ngram=min(options.min_ngram, options.max_ngram))


def _add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--batch-size", "--max-num-seqs", type=positive, default=16, metavar="B",
        help="sequences decoded at once",
    )  # fmt: skip
    group.add_argument(
        "--max-length", "--max-model-len", type=positive, metavar="N",
        help="longest prompt plus output (default: the model's context)",
    )  # fmt: skip
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the models; auto: the target's own"
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda when there is one)")
    group.add_argument("--threads", type=positive, help="CPU threads")
    group.add_argument(
        "--experts-implementation", default=OURS, metavar="NAME",
        help=f"{OURS} (default) or one of transformers' own, which turn our dense kernels off",
    )  # fmt: skip
    group.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    group.add_argument(
        "--attention", "--attn-implementation", choices=ATTENTION, default=ATTENTION[0],
        help="auto: our kernel where there is one",
    )  # fmt: skip


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


def _gamma(text: str) -> int | str:
    if text == GAMMA_AUTO:
        return text
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected {GAMMA_AUTO} or an integer >= 0, got {text!r}")
    return value


def positive(text: str) -> int:
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
        if key not in _SPECULATIVE_FLAGS:
            known = ", ".join(_SPECULATIVE_FLAGS)
            raise argparse.ArgumentTypeError(f"unknown key {key!r}; known: {known}")
    return config


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, then let ``--speculative-config`` set the flags that its keys name."""
    args = parser.parse_args(argv)
    config = getattr(args, "speculative_config", None)
    if not config:
        return args
    # Through a parser once more: the same checks and the same messages as for flags. It leaves
    # alone what the namespace has and no flag names.
    flags = OneLineParser(prog=parser.prog, add_help=False)
    add_model_arguments(flags)
    argv = [f"{_SPECULATIVE_FLAGS[key]}={value}" for key, value in config.items()]
    return flags.parse_args(argv, args)
