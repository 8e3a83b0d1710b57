"""Reading a command line: flags, then ``--speculative-config``, then what contradicts what."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decoder.builtin import BUILTIN, default_target
from decoder.checkpoint.folder import could_be_hub_name, is_gguf, model_folder
from decoder.cli.files.strict_json import kind, parse_object, unknown_key
from decoder.drafters.table import AUTO, DrafterKind, canonical_name, drafter_kind
from decoder.errors import UserError
from decoder.gamma.base import AUTO as GAMMA_AUTO
from decoder.requests.params import shown

from .offload_options import offload_of
from .options import OURS, OneLineParser, add_model_arguments, draft_flag, given_draft_options
from .parallel_options import check_parallel

# vLLM's keys of --speculative-config: the flag that each one sets, and what its value is.
_SPECULATIVE_KEYS: dict[str, tuple[str, type]] = {
    "method": ("--drafter", str),
    "model": ("--draft", str),
    "num_speculative_tokens": ("--gamma", int),
    "prompt_lookup_max": ("--prompt-lookup-max", int),
    "prompt_lookup_min": ("--prompt-lookup-min", int),
    "suffix_decoding_max_tree_depth": ("--suffix-decoding-max-tree-depth", int),
    "suffix_decoding_max_cached_requests": ("--suffix-decoding-max-cached-requests", int),
    "suffix_decoding_max_spec_factor": ("--suffix-decoding-max-spec-factor", float),
    "suffix_decoding_min_token_prob": ("--suffix-decoding-min-token-prob", float),
    "quantization": ("--draft-dtype", str),
    "rejection_sample_method": ("--verifier", str),
}


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, let ``--speculative-config`` set the flags that its keys name, and check drafting.

    Raises:
        UserError: flags that contradict each other, or name what is not there.
    """
    args = parser.parse_args(argv)
    text = getattr(args, "speculative_config", None)
    if text is not None:
        _apply(args, _speculative_config(text), parser.prog)
    check_parallel(args)
    if hasattr(args, "drafter"):
        offload_of(args)
        _check_paths(args)
        _check_drafting(args)
        for flag in ("batch_invariant", "int8_activations"):
            if getattr(args, flag) and args.experts_implementation != OURS:
                raise UserError(
                    f"--{flag.replace('_', '-')} is read by --experts-implementation {OURS} only, "
                    f"got {shown(args.experts_implementation)}"
                )
    return args


def target_name(args: argparse.Namespace) -> str:
    """What decodes: a path or a built-in model's name, the default one's unless one is given."""
    return args.target or default_target()


def draft_path(args: argparse.Namespace, target: str) -> str | Path | None:
    """What drafts: what ``--draft`` names, or the own draft of a built-in ``target``."""
    if args.draft is not None or target not in BUILTIN:
        return args.draft
    kernels = args.experts_implementation == OURS and args.weight_format is None
    name = canonical_name(args.drafter)
    return BUILTIN[target].draft_of(name, args.device, args.dtype, kernels)


def _speculative_config(text: str) -> dict[str, Any]:
    name = "argument --speculative-config"
    try:
        config = parse_object(text)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    for key, value in config.items():
        if key not in _SPECULATIVE_KEYS:
            known = ", ".join(_SPECULATIVE_KEYS)
            raise UserError(f"{name}: {unknown_key(key, _SPECULATIVE_KEYS, known)}")
        expected = _SPECULATIVE_KEYS[key][1]
        if type(value) is not expected and not (expected is float and type(value) is int):
            what = {str: "text", int: "an integer", float: "a number"}[expected]
            raise UserError(f"{name}: {key!r} must be {what}, got {kind(value)}")
    return config


def _apply(args: argparse.Namespace, config: dict[str, Any], prog: str) -> None:
    # Through a parser once more: the same checks and the same messages as for flags.
    flags = OneLineParser(prog=prog, add_help=False)
    add_model_arguments(flags)
    default, unsaid = flags.parse_args([]), object()
    named = flags.parse_args(
        [f"{_SPECULATIVE_KEYS[key][0]}={config[key]}" for key in config],
        argparse.Namespace(**dict.fromkeys(vars(default), unsaid)),
    )
    for name, value in vars(named).items():
        if value is unsaid:
            continue
        own, usual = getattr(args, name), getattr(default, name)
        if own not in (usual, value):
            raise UserError(
                f"expected one value, got {own!r} from a flag and {value!r} from "
                "--speculative-config"
            )
        setattr(args, name, value)


def _check_paths(args: argparse.Namespace) -> None:
    """Both models exist, also one that will not be used."""
    target = None if args.target in BUILTIN else args.target
    for flag, path in (("--target", target), ("--draft", args.draft)):
        if path and not could_be_hub_name(path) and not Path(path).exists():
            raise UserError(f"{flag} {shown(path)} does not exist")


def _check_drafting(args: argparse.Namespace) -> None:
    """Nothing is said about drafting that the drafter would not read."""
    options = given_draft_options(args)
    chosen = drafter_kind(args.drafter) if args.drafter != AUTO else None
    if chosen and args.draft is not None and chosen.draft == "none":
        raise UserError(f"--draft is not read by {chosen.name}; expected a drafter that reads it")
    if chosen and chosen.name == "none" and args.gamma not in (GAMMA_AUTO, 0):
        raise UserError(f"--gamma {args.gamma} is not read by none, which drafts nothing")
    if args.max_gamma is not None and args.gamma != GAMMA_AUTO:
        raise UserError(f"--max-gamma is read by --gamma {GAMMA_AUTO} only, got {args.gamma}")
    if options:
        if chosen is None:
            draft = draft_path(args, target_name(args))
            if draft is not None:
                draft = Path(draft) if is_gguf(draft) else model_folder(draft, "draft")
            chosen = drafter_kind(AUTO, draft)
        _check_options(options, chosen)


def _check_options(options: dict[str, Any], reader: DrafterKind) -> None:
    for name in options:
        if name not in reader.options:
            known = ", ".join(draft_flag(option) for option in reader.options) or "no such option"
            raise UserError(f"{draft_flag(name)} is not read by {reader.name}, which reads {known}")
    low, high = options.get("min_ngram"), options.get("max_ngram")
    if low is not None and high is not None and low > high:
        raise UserError(
            f"--prompt-lookup-min must not exceed --prompt-lookup-max, got {low} and {high}"
        )
