"""Flags shared by the sub-commands, under the names people know. ``setup`` builds from them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from decoder.checkpoint.folder import GENERATION_CONFIG, read_json
from decoder.drafters import DRAFTERS, DraftOptions
from decoder.drafters.table import AUTO as DRAFTER_AUTO
from decoder.drafters.table import drafter_names
from decoder.errors import UserError, one_line
from decoder.gamma.base import AUTO as GAMMA_AUTO
from decoder.gamma.base import DEFAULT_MAX_GAMMA
from decoder.model.kernels import ATTENTION, QUANTIZED
from decoder.model.loading import DTYPES
from decoder.requests.chat import as_chat
from decoder.requests.defaults import generation_fields, model_defaults
from decoder.requests.params import SamplingParams, shown
from decoder.requests.reader import NotYet
from decoder.sampling import VERIFIERS

from . import flag_types as types
from .offload_options import add_offload_arguments
from .parallel_options import add_parallel_arguments
from .streams import say

OURS = "moesd"  # the experts implementation that comes with our other kernels
CONFIG_AUTO, CONFIG_NONE = "auto", "none"  # generation configs besides a path

# Field of ``DraftOptions``: its flag, type, metavar and meaning.
_DRAFT_FLAGS = {
    "max_ngram": (
        "--prompt-lookup-max", types.whole(1, types.MAX_NGRAM), "N", "most tokens looked up",
    ),
    "min_ngram": ("--prompt-lookup-min", types.whole(1, types.MAX_NGRAM), "N", "fewest"),
    "max_tree_depth": (
        "--suffix-decoding-max-tree-depth", types.whole(1, types.MAX_NGRAM), "N",
        "most tokens looked up",
    ),
    "max_cached_requests": (
        "--suffix-decoding-max-cached-requests", types.whole(0, types.MAX_COUNT), "N",
        "finished sequences looked in",
    ),
    "max_spec_factor": (
        "--suffix-decoding-max-spec-factor", types.number(0, types.MAX_NGRAM), "X",
        "most tokens proposed per token found",
    ),
    "min_token_prob": (
        "--suffix-decoding-min-token-prob", types.number(0, 1), "P",
        "least share of what followed before that is proposed",
    ),
    "ngram_threshold": (
        "--ngram-threshold", types.positive, "N",
        "repeated tokens from which n-gram lookup overrides the drafter",
    ),
    "self_top_k": (
        "--self-draft-top-k", types.positive, "K",
        "experts per token while drafting (default: half)",
    ),
    "weight_format": (
        "--draft-dtype", types.one_of(QUANTIZED), "|".join(QUANTIZED),
        "integers for the matrices of the draft alone",
    ),
    "replay_alpha": (
        "--replay-alpha", types.number(0, 1), "A", "acceptance that is simulated",
    ),
}  # fmt: skip


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are a ``UserError``: no usage, no exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Target, drafter, and how to run them."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--target", "--model", type=types.path, metavar="PATH",
        help="target model or GGUF file, or a built-in one: smol, embedded (default: smol if it "
        "can be had)",
    )  # fmt: skip
    group.add_argument(
        "--chat-template", type=types.chat_template, metavar="FILE|TEXT",
        help="instead of the target's own; Jinja",
    )  # fmt: skip
    group.add_argument(
        "--draft", "--draft-model", "--assistant-model", "--spec-model",
        "--speculative-draft-model-path", type=types.path, metavar="PATH", dest="draft",
        help="draft model, EAGLE head or MTP heads (default with a built-in target: its own)",
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
        type=types.gamma, default=GAMMA_AUTO, metavar=f"N|{GAMMA_AUTO}",
        help="draft length (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--max-gamma", type=types.whole(1, types.MAX_GAMMA), metavar="N",
        help=f"longest that auto considers (default: {DEFAULT_MAX_GAMMA})",
    )  # fmt: skip
    group.add_argument(
        "--verifier", "--rejection-sample-method", choices=VERIFIERS, default=VERIFIERS[0],
        help="how drafts are accepted (default: %(default)s)",
    )  # fmt: skip
    _add_draft_options(group)
    group.add_argument(
        "--speculative-config", type=types.text, metavar="JSON", help="in vLLM's keys"
    )
    _add_machine_arguments(parser)
    add_parallel_arguments(parser)


def _add_draft_options(group: argparse._ArgumentGroup) -> None:
    """One flag per field of ``DraftOptions`` that a drafter reads; ``None`` where not given."""
    default = DraftOptions()
    for name, (flag, kind, metavar, meaning) in _DRAFT_FLAGS.items():
        readers = ", ".join(k.name for k in DRAFTERS.values() if name in k.options)
        value = getattr(default, name)
        group.add_argument(
            flag, dest=name, type=kind, metavar=metavar,
            help=f"{readers}: {meaning}" + ("" if value is None else f" (default: {value})"),
        )  # fmt: skip


def given_draft_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say about drafting, by fields of ``DraftOptions``."""
    values = {name: getattr(args, name) for name in _DRAFT_FLAGS}
    return {name: value for name, value in values.items() if value is not None}


def draft_flag(name: str) -> str:
    """The flag of a field of ``DraftOptions``."""
    return _DRAFT_FLAGS[name][0]


def draft_options(args: argparse.Namespace, **given: Any) -> DraftOptions:
    """What the flags say about drafting; ``given``: the fields that have no flag."""
    options = DraftOptions(**given_draft_options(args), **given)
    return replace(options, min_ngram=min(options.min_ngram, options.max_ngram))


def add_chat_argument(group: argparse._ArgumentGroup) -> None:
    """For commands that read prompts; ``chats`` does it."""
    group.add_argument(
        "--apply-chat-template", action="store_true",
        help="make each text prompt a message of the user's",
    )  # fmt: skip


def chats(args: argparse.Namespace, prompts: Iterable[Any]) -> Iterable[Any]:
    """The prompts, texts as chats if ``--apply-chat-template`` says so."""
    if not args.apply_chat_template:
        return prompts
    return (item if isinstance(item, NotYet) else as_chat(item) for item in prompts)


def _add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--batch-size", "--max-num-seqs", type=types.whole(1, types.MAX_BATCH), default=16,
        metavar="B", help="sequences decoded at once (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--max-length", "--max-model-len", type=types.integer, metavar="N",
        help="longest prompt plus output (default: the model's context)",
    )  # fmt: skip
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the models; auto: the target's own"
    )
    group.add_argument(
        "--device", type=types.device, help="cpu, cuda, cuda:1, … (default: cuda when there is one)"
    )
    group.add_argument("--threads", type=types.threads, metavar="N", help="CPU threads")
    group.add_argument(
        "--experts-implementation", type=types.text, default=OURS, metavar="NAME",
        help=f"{OURS} (default) or one of transformers' own, which turn our dense kernels off",
    )  # fmt: skip
    group.add_argument(
        "--batch-invariant", action="store_true",
        help="on a GPU, rows' bits do not depend on the batch (a CPU's never do)",
    )  # fmt: skip
    group.add_argument(
        "--int8-activations", action="store_true",
        help="on a CPU, a quantised target rounds what its matrices are multiplied with",
    )  # fmt: skip
    group.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    group.add_argument(
        "--attention", "--attn-implementation", choices=ATTENTION, default=ATTENTION[0],
        help="auto: our kernel where there is one",
    )  # fmt: skip
    add_offload_arguments(group)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per field of ``SamplingParams``; ``None`` where not given."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--generation-config", type=types.path, default=CONFIG_AUTO,
        metavar=f"{CONFIG_AUTO}|{CONFIG_NONE}|PATH",
        help="where flags that are not given come from: the target's generation_config.json "
        f"({CONFIG_AUTO}), nowhere, or another file or folder",
    )  # fmt: skip
    for name in ("temperature", "top-p", "min-p"):
        group.add_argument(f"--{name}", type=float, metavar="X", help=_default(name))
    group.add_argument("--top-k", type=types.integer, metavar="K", help=_default("top-k"))
    for name in ("repetition-penalty", "presence-penalty", "frequency-penalty"):
        group.add_argument(f"--{name}", type=float, metavar="X", help=_default(name))
    group.add_argument(
        "--logit-bias", type=types.logit_bias, metavar="JSON", help='{"token id": bias}'
    )
    group.add_argument(
        "--max-new-tokens", "--max-tokens", type=types.integer, metavar="N",
        help=_default("max-new-tokens"),
    )  # fmt: skip
    group.add_argument("--min-new-tokens", "--min-tokens", type=types.integer, metavar="N")
    group.add_argument("--seed", type=types.integer, metavar="N")
    group.add_argument("--stop", action="append", type=types.text, metavar="TEXT")
    group.add_argument("--stop-token-ids", type=types.integer, nargs="+", metavar="ID")
    group.add_argument("--ignore-eos", action="store_true", default=None)
    group.add_argument("--logprobs", type=types.integer, metavar="N")


def _default(name: str) -> str:
    return f"default: {getattr(SamplingParams(), name.replace('-', '_'))}"


def sampling_params(args: argparse.Namespace, model: Any = None) -> SamplingParams:
    """The parameters that the flags describe, over the defaults of the model.

    What comes from a generation config, and what in it is not done, is said on standard error.

    Args:
        model: the loaded target; ``None``, before there is one, looks at the flags alone.

    Raises:
        UserError: a value out of range, or a generation config that cannot be read.
    """
    names = SamplingParams.__dataclass_fields__
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    config = _generation_config(args.generation_config, model)
    taken, left_out = model_defaults(config)
    taken = {name: value for name, value in taken.items() if name not in given}
    try:
        SamplingParams(**given)
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        params = SamplingParams(**taken, **given)
    except ValueError as error:
        raise UserError(
            f"generation config: {error}; --generation-config {CONFIG_NONE} leaves it out"
        ) from None
    if model is not None:
        _tell(taken, left_out)
    return params


def _generation_config(source: str, model: Any) -> dict[str, Any]:
    if source == CONFIG_AUTO:
        return generation_fields(model)
    if source == CONFIG_NONE:
        return {}
    path = Path(source)
    return read_json(path / GENERATION_CONFIG if path.is_dir() else path)


def _tell(taken: dict[str, Any], left_out: dict[str, Any]) -> None:
    default = SamplingParams()
    taken = {name: value for name, value in taken.items() if value != getattr(default, name)}
    parts = [
        f"{what} the generation config: "
        + ", ".join(f"{name} {shown(value)}" for name, value in fields.items())
        for what, fields in (("from", taken), ("left out of", left_out))
        if fields
    ]
    if parts:
        say(one_line("; ".join(parts)))
