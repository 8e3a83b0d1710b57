"""vLLM as it is and with our experts inside: both engines of a run, and how their tokens agree."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from bench.peers.vllm_generate import OUR_EXPERTS, Tokens, VllmGenerate, VllmSetup

VLLM = "vLLM"
PLUGIN = "vLLM, our experts"


class InVllm:
    """Engines by their names as variants, and what has come out of them.

    Args:
        python: of an environment with vLLM; where our plugin is installed there, too, there are two
            engines.
        model: the target, of transformers; saved where the engines read it.
        batch: prompts of a call.
    """

    def __init__(self, python: str, model: Any, batch: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="moesd-vllm-")
        model.save_pretrained(self._folder.name)
        self.engines: dict[str, VllmGenerate] = {}
        self._outputs: dict[str, list[Tokens]] = {}
        self._one_by_one: Tokens = []
        for name, plugin in ((VLLM, False), (PLUGIN, True)):
            setup = VllmSetup(self._folder.name, batch, plugin)
            engine = VllmGenerate(python, setup, torch.get_num_threads())
            if plugin and engine.experts != [OUR_EXPERTS]:
                engine.close()
                continue
            self.engines[name] = engine
            self._outputs[name] = []

    def run(self, name: str, prompts: Tokens, new_tokens: int) -> tuple[float, Tokens]:
        """Seconds of a call, and its tokens."""
        seconds, tokens = self.engines[name].run(prompts, new_tokens)
        self._outputs[name].append(tokens)
        return seconds, tokens

    def run_one_by_one(self, prompts: Tokens, new_tokens: int) -> None:
        """vLLM's own tokens of each prompt alone: what else is in its batch may change them."""
        run = self.engines[VLLM].run
        self._one_by_one = [run([prompt], new_tokens)[1][0] for prompt in prompts]

    def fields(self, name: str) -> dict[str, object]:
        """Of a variant's line: which experts ran, and how far its tokens are vLLM's own."""
        if name not in self.engines:
            return {}
        engine, outputs = self.engines[name], self._outputs
        fields: dict[str, object] = {"vllm": engine.version, "experts": engine.experts}
        if name == PLUGIN:
            return fields | {"agrees_with_vllm": agreement(outputs[PLUGIN][-1], outputs[VLLM][-1])}
        first, *later = outputs[VLLM]
        again = [agreement(tokens, first) for tokens in later]
        return fields | {
            "agrees_again": min(again, key=lambda each: each["tokens"]),
            "agrees_one_by_one": agreement(self._one_by_one, first),
        }

    def close(self) -> None:
        """End the engines and forget the model's files."""
        for engine in self.engines.values():
            engine.close()
        self._folder.cleanup()


def agreement(tokens: Tokens, others: Tokens) -> dict[str, int]:
    """How far outputs agree, sequence by sequence: after the first other token texts part.

    Returns:
        ``sequences`` that are the same; ``tokens`` before the first that differs, of all ``of``.
    """
    same = 0
    for ours, theirs in zip(tokens, others, strict=True):
        pairs = list(zip(ours, theirs, strict=True))
        same += next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return {
        "sequences": sum(a == b for a, b in zip(tokens, others, strict=True)),
        "tokens": same,
        "of": sum(map(len, tokens)),
    }
