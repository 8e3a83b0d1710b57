"""transformers' own ``generate`` as a peer: greedy, dynamic cache, its default experts."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel


class TransformersGenerate:
    """Batched greedy ``model.generate`` on left-padded prompts."""

    def __init__(self, model: PreTrainedModel, experts: str = "grouped_mm") -> None:
        self.model: Any = model
        if hasattr(model.config, "num_experts") or hasattr(model.config, "num_local_experts"):
            model.set_experts_implementation(experts)
        # No end of sequence, and none of the penalties and limits that a checkpoint may bring: as
        # for us, a token is the likeliest.
        self.model.generation_config = GenerationConfig()

    def run(self, prompts: list[list[int]], max_new_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds of one call, and the new tokens of each prompt."""
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        device = self.model.device
        ids, mask = ids.to(device), mask.to(device)
        begin = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=0,
            )
        tokens = out[:, longest:].tolist()
        return time.perf_counter() - begin, tokens
