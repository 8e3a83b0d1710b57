"""The sampler: per-row parameters, processed distributions, draws, verification.

Written to run on an accelerator without waiting for it; so far run on CPUs only.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from decoder.model import kernels
from decoder.model.capture import SharedMemory
from decoder.requests.params import SamplingParams
from decoder.round import Draft, Verdict

from . import rng
from .accept import accept_standard, verify_by, verify_greedy
from .block import accept_block
from .coupled import race, verify_coupled
from .distribution import Probs, most_probable, sampled
from .logprobs import TokenLogprobs, token_logprobs
from .penalties import Adjustments
from .processors import LogitsProcessor, ProcessorTable
from .rng import Stream
from .rows import RowTable, check_request
from .verdict import assemble, leading, residual

VerifierName = Literal["standard", "block", "coupled"]
VERIFIERS: tuple[str, ...] = get_args(VerifierName)


class Sampler:
    """Decides tokens for the rows of a batch, exactly as the target alone would.

    All methods taking ``rows`` work on any subset of the admitted rows. No method waits for an
    accelerator, and until ``commit`` none changes what a later call returns: a round can be
    repeated.

    Args:
        max_batch_size: number of rows.
        vocab_size: V, of the logits.
        device: of the logits.
        verifier: ``"standard"`` rejection sampling, ``"block"`` (accepts more, same law) or
            ``"coupled"`` (output equals the target's own sampled output for the seed). Greedy
            requests are verified by argmax under each of them.
    """

    def __init__(
        self,
        max_batch_size: int,
        vocab_size: int,
        device: torch.device | str,
        verifier: VerifierName = "standard",
    ) -> None:
        if verifier not in VERIFIERS:
            raise ValueError(f"verifier must be one of {', '.join(VERIFIERS)}, got {verifier!r}")
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.verifier = verifier
        # One more than there are: where a graph's padding looks and writes.
        rows = max_batch_size + 1
        self._table = RowTable(rows, vocab_size, self.device)
        self._adjustments = Adjustments(rows, vocab_size, self.device)
        self._processors = ProcessorTable()
        self._draft_probs = SharedMemory(self.device)

    @torch.inference_mode()  # tables grow, and tensors made in this mode stay in it
    def admit(
        self,
        row: int,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        stop_ids: Iterable[int],
        process: LogitsProcessor | None = None,
    ) -> None:
        """Start a request.

        Args:
            row: a free row.
            params: how its tokens are chosen.
            prompt_ids: its prompt, counted for the repetition penalty; the next token's absolute
                position is its length.
            stop_ids: ids that end it, banned before ``min_new_tokens``.
            process: what else is done to the target's logits, before all of ``params``.

        Raises:
            ValueError: an id outside the vocabulary, or more log-probabilities than it has.
        """
        stop_ids = set(stop_ids)
        check_request(params, prompt_ids, stop_ids, self.vocab_size)
        self._table.admit(row, params)
        self._adjustments.admit(row, params, prompt_ids, stop_ids)
        self._processors.admit(row, process, stop_ids)

    @torch.inference_mode()
    def release(self, row: int) -> None:
        """End the request in ``row``, if there is one."""
        self._table.release(row)
        self._adjustments.release(row)
        self._processors.release(row)

    def all_greedy(self, rows: Iterable[int] | Tensor) -> bool:
        """Whether an argmax decides every row. Known on the host without waiting for the device."""
        return self._table.all_greedy(rows)

    def takes_argmax(self, rows: Iterable[int] | Tensor) -> bool:
        """Whether every row's token is the largest of its logits as the model gave them."""
        return self.all_greedy(rows) and not self._adjustments.active

    @property
    def has_processors(self) -> bool:
        """Whether a request's own Python looks at the target's logits: no graph may hold that."""
        return self._processors.active

    def plan(self, dtype: torch.dtype) -> Hashable:
        """What a graph of these methods on logits of ``dtype`` holds, besides any processors.

        Kernels find a row's truncation in its tables, as another graph's operations are chosen by
        all that some row asks for.
        """
        by_kernels = kernels.sampling_ops(self.device, dtype) is not None
        features = self._table.features
        return features.any_sampled if by_kernels else features, self._adjustments.plan

    def draft_probs(self, batch: int, gamma: int, dtype: torch.dtype) -> Tensor:
        """Where graphs leave and find a draft's distributions ``[batch, gamma, V]``."""
        largest = (len(self._table.seeds) - 1) * gamma * self.vocab_size
        return self._draft_probs.shaped((batch, gamma, self.vocab_size), dtype, largest)

    def processed(self, logits: Tensor, rows: Tensor, draft: Draft | None) -> Tensor:
        """The target's logits as the requests' own processors leave them, for ``distribution``.

        Args:
            logits: ``[B, Q, V]`` floating, not modified.
            rows: ``[B]`` int64.
            draft: what is verified, ``G = Q - 1``; ``None`` for Q = 1.
        """
        return self._processors.apply(logits, rows, draft)

    def distribution(
        self, logits: Tensor, rows: Tensor, positions: Tensor, prefix: Tensor | None = None
    ) -> Probs:
        """What the tokens at ``positions`` are drawn from; the same for drafts and the target.

        Args:
            logits: ``[B, Q, V]`` floating, not modified.
            rows: ``[B]`` int64.
            positions: ``[B, Q]`` int64 absolute positions of the tokens to be chosen; negative
                ones are padding.
            prefix: ``[B, n]`` int64 drafted tokens that are not committed yet, ``n >= Q - 1``: the
                last ``Q - 1`` stand between the positions, earlier ones before all of them. They
                count for penalties.
        """
        if logits.shape[-1] != self.vocab_size:
            raise ValueError(f"logits must be [B, Q, {self.vocab_size}], got {list(logits.shape)}")
        adjusted = self._adjustments.active
        if adjusted:
            dtype = torch.promote_types(logits.dtype, torch.float32)
            logits = logits.to(dtype, copy=True)
            logits = self._adjustments.apply(logits, rows, positions, prefix)
        if self.all_greedy(rows):
            return Probs(None, *most_probable(logits))
        return sampled(logits, rows, self._table, overwrite=adjusted)

    def draw(self, probs: Probs, rows: Tensor, positions: Tensor) -> Tensor:
        """Tokens ``[B]`` of the target itself at ``positions`` ``[B]``, from ``probs`` (Q = 1)."""
        return self._draw(probs, rows, positions, Stream.TARGET)

    def draw_draft(self, probs: Probs, rows: Tensor, positions: Tensor) -> Tensor:
        """Proposals ``[B]`` from the draft's distribution ``probs`` (Q = 1).

        Coupled: the noise that will decide the target's token. Otherwise noise of this round's own.
        """
        if self.verifier == "coupled":
            return self.draw(probs, rows, positions)
        return self._draw(probs, rows, positions, Stream.DRAFT)

    def verify(self, target: Probs, draft: Draft, rows: Tensor, positions: Tensor) -> Verdict:
        """Keep the drafts that the target would have produced, and choose the token after them.

        Args:
            target: distributions ``[B, G + 1]`` from ``distribution``.
            draft: proposals; ``G`` may be 0.
            rows: ``[B]`` int64.
            positions: ``[B, G + 1]`` int64.

        Returns:
            Accepted counts and emitted tokens.
        """
        if target.argmax is not None:
            return verify_greedy(target.argmax, draft)
        assert target.probs is not None
        if (ops := kernels.sampling_ops(self.device, target.probs.dtype)) is not None:
            return verify_by(ops, self.verifier, target, draft, rows, positions, self._table)
        seeds = self._table.seeds[rows]
        if self.verifier == "coupled":
            return verify_coupled(target.probs, draft, rng.key(seeds, positions, Stream.TARGET))
        if self.verifier == "block" and target.undefined is not None and draft.gamma:
            # Here what comes after a draft decides on it, too: end before what is undefined.
            defined = leading(~target.undefined[:, : draft.gamma], draft.lengths)
            draft = Draft(draft.tokens, draft.probs, defined)
        accepted, weight = self._accept(target.probs, draft, rows, positions)
        left = residual(target.probs, draft, accepted, weight)
        at = positions.gather(1, accepted[:, None])[:, 0]
        # A row whose drafts were all kept takes the token it would take without speculation.
        keys = torch.where(
            accepted == draft.lengths,
            rng.key(seeds, at, Stream.TARGET),
            rng.key(seeds, at, Stream.RESIDUAL),
        )
        return assemble(accepted, race(left, keys), draft.tokens)

    @torch.inference_mode()
    def commit(
        self, rows: Tensor, tokens: Tensor, counts: Tensor, drafted: Tensor | None = None
    ) -> None:
        """Take note of what was emitted; changes all of it or, when it raises, nothing.

        Args:
            rows: ``[B]`` int64.
            tokens: ``[B, n]`` int64, counted for penalties.
            counts: ``[B]`` int64, how many of them.
            drafted: ``[B]`` int64, how many drafts were verified; ``None`` is none in any row.
        """
        rounds = self._table.rounds
        if drafted is not None and self._table.features.any_sampled:
            rounds = self._table.rounds_after(rows, drafted > 0)
        self._adjustments.commit(rows, tokens, counts)
        self._processors.commit(rows, tokens, counts)
        if rounds is not self._table.rounds:
            self._table.rounds.copy_(rounds)  # where graphs read them

    def logprobs(self, logits: Tensor, target: Probs, tokens: Tensor, top: int) -> TokenLogprobs:
        """Log-probabilities of a round's emitted ``tokens``; see ``token_logprobs``."""
        return token_logprobs(logits, target, tokens, top)

    def scores(self, logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """What the target's own token is the argmax of, in units of logits; for audits.

        Greedy rows: adjusted logits. Sampled rows: ``temperature * (log(probs) + gumbel)`` with the
        row's noise, ``-inf`` for tokens cut by truncation.

        Args:
            logits: ``[B, 1, V]``.
            rows: ``[B]`` int64.
            positions: ``[B, 1]`` int64.

        Returns:
            ``[B, V]`` fp32 or fp64.
        """
        dtype = torch.promote_types(logits.dtype, torch.float32)
        adjusted = logits.to(dtype, copy=True)
        if self._adjustments.active:
            adjusted = self._adjustments.apply(adjusted, rows, positions, None)
        probs = self.distribution(logits, rows, positions).probs
        if probs is None:
            return adjusted[:, 0]
        seeds = self._table.seeds[rows]
        noise = rng.gumbel(seeds, positions[:, 0], self.vocab_size, Stream.TARGET)
        sampled = (probs[:, 0].log() + noise) * self._table.temperature[rows][:, None]
        return torch.where(self._table.greedy[rows][:, None], adjusted[:, 0], sampled)

    def _accept(
        self, target_probs: Tensor, draft: Draft, rows: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if draft.gamma == 0:
            return torch.zeros_like(rows), None
        seeds = self._round_seeds(rows)
        uniforms = rng.uniform(seeds, positions[:, : draft.gamma], Stream.ACCEPT)
        if self.verifier == "block":
            return accept_block(target_probs, draft, uniforms)
        return accept_standard(target_probs, draft, uniforms), None

    def _round_seeds(self, rows: Tensor) -> Tensor:
        """Seeds of this round's drafts and accept tests.

        A position can be drafted in several rounds. Block verification, and any choice of draft
        length made from an earlier round's drafts, depend on tokens that were then thrown away;
        drawing the position again with the same noise would be conditional on that, and biased.
        """
        return rng.fold(self._table.seeds[rows], self._table.rounds[rows])

    def _draw(self, probs: Probs, rows: Tensor, positions: Tensor, stream: Stream) -> Tensor:
        if probs.argmax is not None:
            return probs.argmax[:, 0]
        assert probs.probs is not None
        drafts = stream is Stream.DRAFT
        if (ops := kernels.sampling_ops(self.device, probs.probs.dtype)) is not None:
            rounds = self._table.rounds if drafts else None
            noise = (self._table.seeds, positions[:, None], int(stream), rounds)
            return ops.race(probs.probs, rows, *noise)[:, 0]
        seeds = self._round_seeds(rows) if drafts else self._table.seeds[rows]
        return race(probs.probs[:, 0], rng.key(seeds, positions, stream))
