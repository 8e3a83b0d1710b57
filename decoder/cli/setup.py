"""What the flags describe, loaded once: a target, and any number of decoders on it."""

from __future__ import annotations

import argparse
import os
import signal
import time
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from decoder import smol
from decoder.builtin import BUILTIN, EMBEDDED
from decoder.drafters import Drafter, build_drafter
from decoder.engine.loop import SpeculativeDecoder
from decoder.engine.profile_rounds import profile_rounds
from decoder.errors import RankLost
from decoder.gamma.base import DEFAULT_MAX_GAMMA
from decoder.model.kernels import with_int8_activations
from decoder.model.loading import load_model, load_tokenizer, require_fitting_tokenizer
from decoder.parallel.group import Ranks
from decoder.parallel.runner import lead
from decoder.parallel.worker import serve

from .arguments import draft_path, target_name
from .offload_options import offload_of
from .options import OURS, draft_options
from .streams import say

_TURN = 2.0  # seconds after which another rank says what rank 0 has not: it is gone
_STOPPED = 1  # exit code


class Setup:
    """Loaded target and tokenizer; makes any number of decoders on them.

    Args:
        args: parsed flags of ``options.add_model_arguments``.

    Attributes:
        target: the loaded target model.
        tokenizer: its tokenizer.
        name: of the target: a path, or a built-in model's name.
        path: directory or hub name of both; a built-in model is made when first asked for.

    Raises:
        UserError: something that cannot be loaded.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._kernels = args.experts_implementation == OURS
        self.name = target_name(args)
        if args.target is None and self.name == EMBEDDED:
            say(f"moesd: the small embedded pair, for want of the real model: {smol.unavailable()}")
        self.path = _path(self.name)
        self.tokenizer = load_tokenizer(self.path)
        if args.chat_template is not None:
            self.tokenizer.chat_template = args.chat_template
        if args.parallel is None:
            self.target = load_target(args)
        else:
            ranks = Ranks(args.device, args.parallel_timeout)
            self.target = load_target(args, ranks)
            lead(self.target, ranks)
        require_fitting_tokenizer(self.tokenizer, self.target)

    def decoder(self, *, plain: bool = False, profile: bool = True) -> SpeculativeDecoder:
        """A decoder as the flags describe.

        Args:
            plain: one that only decodes autoregressively.
            profile: measure its rounds, for a controller that asks what they cost.
        """
        args = self._args
        decoder = SpeculativeDecoder(
            self.target,
            None if plain else self._drafter(),
            args.gamma,
            args.verifier,
            tokenizer=self.tokenizer,
            max_batch_size=args.batch_size,
            max_length=args.max_length,
            max_gamma=args.max_gamma or DEFAULT_MAX_GAMMA,
            kernels=self._kernels,
            batch_invariant=args.batch_invariant,
            attention=args.attention,
            static=False if args.enforce_eager else "auto",
        )
        # With experts on disk it would read for minutes what nothing is decoded with.
        if profile and args.offload_experts is None:
            profile_rounds(decoder)
        return decoder

    def pair(self) -> tuple[SpeculativeDecoder, SpeculativeDecoder]:
        """A plain decoder and one as the flags describe, for a comparison, which profiles both."""
        return self.decoder(plain=True), self.decoder(profile=False)

    def reference(self) -> Any:
        """The target in fp32 with transformers' own experts and attention: none of our kernels."""
        return load_model(
            self.path, dtype=torch.float32, device=self.target.device, experts="eager"
        )

    def _drafter(self) -> Drafter:
        args = self._args
        options = draft_options(args, kernels=self._kernels, tokenizer=self.tokenizer)
        return build_drafter(args.drafter, self.target, draft_path(args, self.name), options)


def load_target(args: argparse.Namespace, ranks: Ranks | None = None) -> Any:
    """The target that the flags describe or, of several ``ranks``, the part of this one."""
    disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    path, kernels = _path(target_name(args)), args.experts_implementation == OURS
    experts = None if kernels else args.experts_implementation
    if ranks is None:
        target = load_model(
            path,
            dtype=args.dtype,
            device=args.device,
            experts=experts,
            packed=kernels,
            offload=offload_of(args),
        )
        return with_int8_activations(target) if args.int8_activations else target
    from decoder.parallel.loading import load_part  # most of a second, which one process can spare

    return load_part(path, args.parallel, ranks, dtype=args.dtype, experts=experts, kernels=kernels)


def work(args: argparse.Namespace, stderr: int) -> int:
    """What ranks other than 0 do until that one ends: their part of the target's forwards.

    They say nothing, and read and write no file of the user's.

    Args:
        args: as on rank 0.
        stderr: a descriptor, for the one line that is said where rank 0 cannot.

    Returns:
        The exit code.

    Raises:
        UserError: as on rank 0, which says it.
    """
    # An interrupt is rank 0's to act on; torchrun ends the others when one has ended.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ranks = Ranks(args.device, args.parallel_timeout)
    try:
        serve(load_target(args, ranks), ranks)
    except RankLost as lost:
        time.sleep(_TURN)
        if ranks.may_speak():
            os.write(stderr, f"moesd: error: {lost}\n".encode())
        return _STOPPED
    return 0


def _path(name: str) -> str:
    """Directory or hub name of a target; a built-in one is made when first asked for."""
    builtin = BUILTIN.get(name)
    return str(builtin.target_path()) if builtin else name
