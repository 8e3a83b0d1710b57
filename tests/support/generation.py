"""A small batch for transformers' ``generate``, and what it returns with and without our method;
and the same call from several threads at once.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from decoder.hf_generate import speculative

from .tiny import MOE_VOCAB, perturbed, ragged_prompts, tiny_model

PAD, END = 0, 5
_LIMIT_S = 60.0


@functools.cache
def target(family: str) -> Any:
    """A tiny model of a small vocabulary, in fp64: rounding decides nothing."""
    return tiny_model(
        family, torch.float64, vocab_size=MOE_VOCAB, pad_token_id=PAD, eos_token_id=END,
        attn_implementation="sdpa",
    )  # fmt: skip


@functools.cache
def draft(family: str) -> Any:
    return perturbed(target(family))


@functools.cache
def method(family: str, drafter: str) -> Any:
    """Our method for a family, with a draft model or a named drafter."""
    made = draft(family) if drafter == "draft model" else drafter
    return speculative(made, 3, kernels=False)


def left_padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` for ``generate``."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def batch(count: int = 3) -> dict[str, Tensor]:
    """Ragged prompts, the longest first."""
    prompts = [[max(token, 6) for token in prompt] for prompt in ragged_prompts(count, seed=4)]
    return left_padded(sorted(prompts, key=len, reverse=True))


def outcome(model: Any, arguments: dict[str, Any]) -> Tensor | Exception:
    """The sequences that ``generate`` returns, or what it raises."""
    try:
        returned = model.generate(**arguments)
    except Exception as error:
        return error
    return returned if isinstance(returned, Tensor) else returned.sequences


def from_threads(call: Callable[[], Any], count: int = 4) -> list[Any]:
    """What ``call`` returned on each of ``count`` threads, or said as it raised a RuntimeError."""
    results: list[Any] = []
    begin = threading.Barrier(count)

    def work() -> None:
        begin.wait(_LIMIT_S)
        try:
            results.append(call())
        except RuntimeError as error:
            results.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_LIMIT_S)
    assert len(results) == count
    return results
