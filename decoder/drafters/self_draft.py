"""The target drafts for itself with fewer experts per token.

No extra weights and no extra cache: draft steps run the target's own layers, write their keys and
values into the target's own slab at the positions they draft, and the verify forward overwrites
exactly those positions. What is saved is expert bandwidth only; attention, shared experts,
embeddings and the output projection are paid in full.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from decoder.checkpoint.config import experts_per_token
from decoder.errors import UserError
from decoder.round import Draft, StepState

from .base import StatelessDrafter
from .chain import Chains, DraftChain, Reach

if TYPE_CHECKING:
    from decoder.model.runner import ModelRunner
    from decoder.sampling import Sampler


def reduce_top_k(index: Tensor, weights: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Keep each token's ``top_k`` heaviest experts and give them the whole routing weight.

    Args:
        index: ``[T, K]`` expert ids. Routers that select by biased or grouped scores return them
            unsorted, so the heaviest are looked up again rather than sliced off the front.
        weights: ``[T, K]`` routing weights; their sum per token is preserved.
        top_k: experts kept, ``1 <= top_k <= K``.
    """
    kept, order = weights.topk(top_k, dim=-1)
    # Sigmoid routers can underflow to an all-zero row; 0 / 0 would poison the token.
    scale = weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1e-20)
    return index.gather(-1, order), kept * scale


def find_experts(model: nn.Module) -> list[nn.Module]:
    """Modules that take ``(hidden_states, expert ids [T, K], routing weights [T, K])``.

    Transformers marks them with ``use_experts_implementation``, which leaves ``has_gate`` and
    ``is_transposed`` on every instance; the parameter count guards against look-alikes.
    """
    return [
        module
        for module in model.modules()
        if hasattr(module, "has_gate")
        and hasattr(module, "is_transposed")
        and len(inspect.signature(type(module).forward).parameters) >= 2
    ]


class ReducedRouting:
    """Forward pre-hooks on a model's experts that shrink the routing.

    They are there only while it is in use, and heed only the thread that uses it: a hook that
    stayed would outlive the drafter, and the next drafter of the same model would add its own.
    """

    def __init__(self, experts: list[nn.Module], top_k: int) -> None:
        self.top_k = top_k
        self.calls = 0
        self._experts = experts
        self._thread: int | None = None

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:  # somebody else runs the model beside us
            return None
        self.calls += 1
        hidden, index, weights = (*args, *kwargs.values())[:3]
        if index.shape[-1] <= self.top_k:
            return None
        return (hidden, *reduce_top_k(index, weights, self.top_k)), {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._thread = threading.get_ident()
        with ExitStack() as handles:
            for module in self._experts:
                handle = module.register_forward_pre_hook(self._hook, with_kwargs=True)
                handles.callback(handle.remove)
            yield


class SelfDrafter(StatelessDrafter):
    """Draft with the target itself at ``top_k`` experts per token.

    Args:
        top_k: experts per token while drafting; ``None`` takes half of the target's own.
    """

    name = "self"

    def __init__(self, top_k: int | None = None) -> None:
        if top_k is not None and top_k < 1:
            raise ValueError(f"self-draft top_k must be >= 1, got {top_k}")
        self.top_k = top_k
        self._is_bound = False

    def bind(self, runner: ModelRunner, sampler: Sampler, max_gamma: int) -> None:
        experts = find_experts(runner.model)
        if not experts:
            raise UserError(
                f"self-drafting needs a target with routed experts behind transformers' experts "
                f"interface, got {type(runner.model).__name__}"
            )
        full = max(experts_per_token(runner.config), default=0)
        if self.top_k is None:
            self.top_k = max(1, full // 2)
        if 0 < full <= self.top_k:
            raise UserError(
                f"self-draft top_k must be below the target's {full} experts per token, "
                f"got {self.top_k}"
            )
        if self._is_bound:  # its drafts would be written into the cache of whoever bound it last
            raise UserError("expected a self-drafter of its own for each decoder, got a used one")
        self._is_bound = True
        self._runner = runner
        self._sampler = sampler
        self._chains = Chains(runner, sampler, runner.max_length)
        self._reduced = ReducedRouting(experts, self.top_k)

    @torch.inference_mode()
    def propose(self, state: StepState, gamma: int) -> Draft:
        graphs, runner = self._runner.graphs, self._runner
        runner.cache.reserve(min(max(state.host_lengths) + gamma, runner.max_length))
        steps = partial(self._steps, gamma)
        return self._chains.draft(graphs, (self.name, self.top_k), steps, state, gamma)

    def _steps(
        self,
        gamma: int,
        reach: Reach,
        rows: Tensor,
        lengths: Tensor,
        current: Tensor,
        _previous: Tensor,
    ) -> DraftChain:
        runner, calls = self._runner, self._reduced.calls
        chain, token = DraftChain(self._sampler, rows, lengths, gamma), current[:, None]
        with self._reduced():  # also while a graph is captured, which then holds that routing
            for step in range(gamma):
                positions = reach.place(lengths[:, None] + step, step)
                logits, _ = runner.run(
                    token,
                    rows,
                    positions,
                    reach.length(step),
                    most_experts=self.top_k,
                    settled=lengths,
                )
                token = chain.draw(logits)
        if self._reduced.calls == calls and not runner.limits_experts:
            raise RuntimeError(
                "the target's experts were never called through their module, so their routing "
                "could not be reduced; self-drafting cannot run with this kernel path"
            )
        return chain
