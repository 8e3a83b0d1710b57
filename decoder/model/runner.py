"""Runs a transformers causal LM over ragged rows of its own KV cache; one runner per model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from decoder.errors import UserError

from . import attention as ragged
from . import kernels, probe, support
from .attention import Placement
from .cache import RaggedCache, cache_argument
from .graphs import StepGraphs
from .lean import LeanForward, lean_forward, watched_tensors
from .prefill import ForwardOutput, gather, prefill
from .rope import looks_at_positions, row_rope
from .support import attention_configs, attention_named, check_same, hidden_dtype, recurrent_states
from .watch import Watch, is_bare

_STATIC_QUERIES = 32  # wider forwards are prefill


class ModelRunner:
    """A model, its ragged cache, and the forward passes the decoder needs.

    Args:
        model: a transformers causal LM in evaluation mode; its attention implementation is
            switched only while a forward of this runner runs.
        max_batch_size: cache rows.
        max_length: most tokens per row, drafts included.
        attention: ``"auto"`` uses the kernel when there is one, ``"portable"`` never does.
        static: run forwards in fixed-size buffers (``graphs.py``); ``"auto"`` on CUDA, captured.
        longest_draft: that a row of a model with recurrent state has room for.

    Raises:
        UserError: the architecture cannot be run over a ragged cache, with the reason.
    """

    def __init__(
        self,
        model: Any,
        max_batch_size: int,
        max_length: int,
        attention: kernels.AttentionName = "auto",
        static: bool | Literal["auto"] = "auto",
        longest_draft: int = 0,
    ) -> None:
        self.model, self.config = model, model.config.get_text_config(decoder=True)
        states = recurrent_states(model, max_batch_size, max(longest_draft + 1, probe.TRIED))
        self._cache_argument = cache_argument(self.model)
        self._head, self._base = self.model.get_output_embeddings(), self.model.base_model
        self.device = self.model.get_input_embeddings().weight.device
        self.dtype, self.vocab_size = hidden_dtype(self.model), int(self._head.weight.shape[0])
        self.max_batch_size, self.max_length = max_batch_size, max_length
        cuda = self.device.type == "cuda"
        self.asked_static, self.static = static, cuda if static == "auto" else bool(static)
        # Growing would move the slabs under captured graphs.
        whole = max_length if self.static else None
        self.cache = RaggedCache(max_batch_size, max_length, whole, states)
        self._op = kernels.ragged_attention_op(self.device, self.dtype, attention)
        self._windows: dict[int, int] = {}
        self._no_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        self._configs = attention_configs(self.model)
        self._rope = row_rope(self.model, max_batch_size, max_length, self.device)
        self._lean: LeanForward | None = None
        self._new_lean = partial(lean_forward, model, self.cache, self._windows, max_length)
        try:
            self._split_head = self._probe()
        except UserError:  # on a GPU maybe of heads that the kernel does not take
            if self._op is None or not kernels.on_gpu(self.device):
                raise
            self._op = None
            self._split_head = self._probe()
        self.attention_op = self._op  # also for heads of this model's kind of layer
        fixed = self.static and states is None and not looks_at_positions(model)
        captured = self.cache.row_length, cuda, static is True
        self._graphs = StepGraphs(max_batch_size, *captured) if fixed else None
        self._proven = self._split_head, self._lean is not None
        support.warn_of_library_products(model, self._lean is not None and self._lean.whole)
        self._watch = self._look()

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor,
        rows: Tensor,
        positions: Tensor,
        *,
        hidden_layers: Sequence[int] | None = None,
        logits_positions: Tensor | None = None,
        max_position: int | None = None,
        settled: Tensor | None = None,
    ) -> ForwardOutput:
        """Write the tokens' keys and values at their positions and return logits.

        Args:
            input_ids: ``[B, Q]`` int64.
            rows: ``[B]`` int64 cache rows.
            positions: ``[B, Q]`` int64 absolute positions; -1 marks padding, which writes nothing
                visible and whose outputs are meaningless.
            hidden_layers: indices into transformers' ``hidden_states`` to return, concatenated.
            logits_positions: ``[B, n]`` int64 indices into Q; ``None`` is all of them. ``n = 0``
                computes no logits.
            max_position: largest position, when the caller knows it: spares a device sync.
            settled: ``[B]`` int64, how many of a row's tokens are never taken back: with recurrent
                state, all but ``longest_draft + 1`` or more. ``None`` is those before these.
        """
        graphs = self.graphs
        length = (int(positions.max()) if max_position is None else max_position) + 1
        self.cache.reserve(length)
        inputs = input_ids, rows, positions, length, hidden_layers, logits_positions
        if graphs is not None and input_ids.shape[1] <= _STATIC_QUERIES:
            return ForwardOutput(*graphs.forward(self.run, *inputs))
        return ForwardOutput(*self.run(*inputs, settled=settled))

    @torch.inference_mode()
    def prefill(
        self,
        rows: Tensor,
        token_ids: Tensor,
        lengths: Tensor,
        *,
        hidden_layers: Sequence[int] | None = None,
    ) -> ForwardOutput:
        """Fill rows with prompts, in chunks of bounded size.

        Args:
            rows: ``[R]`` int64 cache rows.
            token_ids: ``[R, L]`` int64, right padded.
            lengths: ``[R]`` int64 prompt lengths, at least 1.
            hidden_layers: as in ``forward``; hidden states of padding are zero.

        Returns:
            ``logits [R, 1, V]`` at each row's last prompt token, and ``hidden [R, L, n * H]``.
        """
        with nullcontext() if self._rope is None else self._rope.reading(rows, lengths):
            return prefill(self.forward, rows, token_ids, lengths, hidden_layers)

    @torch.inference_mode()
    def continue_greedily(
        self, input_ids: Tensor, rows: Tensor, positions: Tensor, count: int, max_position: int
    ) -> tuple[Tensor, Tensor] | None:
        """What ``count`` forwards would choose: see ``LeanForward.continue_greedily``.

        ``None`` when this model's steps cannot be taken together. Arguments as in ``forward``.
        """
        self._follow()
        lean = self._lean
        if self._graphs is not None or lean is None or not lean.walks_steps:
            return None
        self.cache.reserve(max_position + count)
        return lean.continue_greedily(input_ids, positions, rows, self._head.weight, count)

    def _follow(self) -> None:
        """Read the model again if somebody has changed it since the last forward.

        Raises:
            UserError: the cache and the tables were made for another model than it is now.
        """
        if self._watch.unchanged():
            return
        check_same(self.model, self.vocab_size, self.dtype, self.device, self._windows)
        self._head, self._base = self.model.get_output_embeddings(), self.model.base_model
        split, lean = self._proven
        self._split_head = split and is_bare(self.model)
        self._lean = self._new_lean() if lean and self._split_head else None
        if self._graphs is not None:
            self._graphs.clear()
        self._watch = self._look()

    def _look(self) -> Watch:
        """The model as it is, with the memory that its forward here reads or has captured."""
        if self._graphs is not None:
            return Watch(self.model, self.model.parameters())
        joined = watched_tensors(self.model) if self._lean is not None else []
        return Watch(self.model, [self._head.weight, *joined])

    @property
    def graphs(self) -> StepGraphs | None:
        """What steps of this model run in, or ``None`` where they must run as they are."""
        self._follow()
        # A capture would hold what a hook did once.
        return None if self._watch.hooked else self._graphs

    @property
    def limits_experts(self) -> bool:
        """Whether ``run`` itself gives a token fewer experts."""
        return self._lean is not None and self._lean.limits_experts

    def run(
        self,
        input_ids: Tensor,
        rows: Tensor,
        positions: Tensor,
        length: int,
        hidden_layers: Sequence[int] | None = None,
        logits_positions: Tensor | None = None,
        most_experts: int | None = None,
        settled: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``forward`` on tensors alone: no host synchronisation, so that a graph may hold it.

        ``most_experts`` of a token where ``limits_experts``, elsewhere by hooks of the caller's.
        """
        if self._graphs is not None:  # of padding in a graph, which no cache row is meant for
            rows = rows.clamp(max=self.max_batch_size - 1)
        placement = self._placed(rows, positions, length)
        position_ids = positions.clamp(min=0)
        if self._lean is not None:
            columns = logits_positions if hidden_layers is None else None
            states, kept = self._lean(
                input_ids, position_ids, placement, hidden_layers, columns, most_experts
            )
            logits = self._lean.head(
                gather(states, logits_positions) if columns is None else states
            )
        else:
            with self._ragged(placement, rows, settled):
                logits, kept = self._model_forward(
                    input_ids, position_ids, hidden_layers, logits_positions
                )
        return logits, torch.cat(kept, dim=-1) if hidden_layers is not None else None

    def _model_forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        hidden_layers: Sequence[int] | None,
        logits_positions: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        inputs = self._inputs(input_ids, position_ids)
        if hidden_layers is not None:
            inputs["output_hidden_states"] = True
        if self._split_head:
            out = self._base(**inputs)
            logits = self._head(gather(out.last_hidden_state, logits_positions))
        else:
            out = self.model(**inputs)
            logits = gather(out.logits, logits_positions)
        return logits, [out.hidden_states[layer] for layer in hidden_layers or ()]

    def _inputs(self, input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": True}
        inputs[self._cache_argument] = self.cache
        # Without attention that reads it, it would be taken for one that hides padding.
        return inputs | {"attention_mask": self._no_mask} if self._windows else inputs

    @contextmanager
    def _ragged(self, placement: Placement, rows: Tensor, settled: Tensor | None) -> Iterator[None]:
        """The model's own layers read the cache inside, as ``placement`` says."""
        where, recurrent = (rows, placement.positions), self.cache.recurrent
        rope = nullcontext() if self._rope is None else self._rope.used(*where)
        states = nullcontext() if recurrent is None else recurrent.running(*where, settled)
        with ragged.placed(placement), attention_named(ragged.NAME, self._configs), rope, states:
            yield

    def _placed(self, rows: Tensor, positions: Tensor, length: int) -> Placement:
        self.cache.select(rows, positions)
        return ragged.place(rows, positions, length, self.max_length, self._op, self._windows)

    @torch.inference_mode()
    def _probe(self) -> bool:
        """Run two short rows: learn the windows, whether logits are ``lm_head(base(...))``, and
        whether the lean forward gives the very same states."""
        ragged.register()
        with probe.refusing(self.model):
            ids = probe.sample(self.model, self.vocab_size, self.max_batch_size)
            first, second = probe.steps(ids)
            self._windows.clear()  # no mask is given before the model has shown its own
            learned, placement = self._tried(self.model, first, learn=True)
            self.logits_dtype = learned.logits.dtype
            probe.check_layers(self.model, placement.calls, self.cache)
            probe.check_windows(self.model, self._windows, self.max_length)
            out, placement = self._tried(self.model, second)
            probe.check(self.model, ids, [(first, learned.logits), (second, out.logits)])
            split = False
            if self._base is not self.model:
                base, placement = self._tried(self._base, second)
                split = probe.splits(self._head, base, out.logits, self.dtype)
                split = split and is_bare(self.model)
            if split and self._op is not None and (lean := self._new_lean()) is not None:
                is_rounding = partial(probe.is_rounding, self.model, ids)
                if lean.equals(base.last_hidden_state, second, placement, is_rounding):
                    self._lean = lean
        self.cache.scrub(slice(len(ids)))
        return split

    def _tried(self, model: Any, step: probe.Step, learn: bool = False) -> tuple[Any, Placement]:
        """What the model or its base gives for a step; ``learn`` has it show its masks."""
        placement = self._placed(step.rows, step.positions, probe.LENGTH)
        placement.probing = learn
        inputs = self._inputs(step.input_ids, step.positions.clamp(min=0))
        with self._ragged(placement, step.rows, None):
            return model(**inputs), placement
