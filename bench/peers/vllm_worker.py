"""The side of the peer that vLLM's own environment runs: the engine behind pipes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MAX_LENGTH = 1024
CACHE_BYTES = 1 << 30


class Engine:
    """vLLM, in this process."""

    def __init__(self, setup: SimpleNamespace) -> None:
        import vllm

        self.setup = setup
        self.vllm = vllm
        self.llm = vllm.LLM(
            model=setup.model,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=MAX_LENGTH,
            max_num_seqs=setup.max_batch_size,
            kv_cache_memory_bytes=CACHE_BYTES,
            **self._speculation(),
        )
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.kept: list[float] = [1.0]
        self.length = 1  # new tokens of the call at hand
        self.ours: Any = None  # our choice of the number of drafts, kept from call to call

    def _speculation(self) -> dict[str, Any]:
        if self.setup.draft is None:
            return {}
        config = {
            "method": "draft_model",
            "model": self.setup.draft,
            "num_speculative_tokens": self.setup.max_gamma,
        }
        return {"speculative_config": config, "scheduler_cls": "moesd_vllm.gamma_scheduler"}

    def run(self, prompts: list[list[int]], length: int) -> dict[str, Any]:
        """Decode greedily."""
        self.length = length
        params = self.vllm.SamplingParams(
            temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False
        )
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        begin = time.perf_counter()
        outputs = self.llm.generate(requests, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "tokens": [list(o.outputs[0].token_ids) for o in outputs]}

    def choose(self, gamma: int | str, kept: list[float]) -> None:
        """Put a controller into the scheduler, and something between the drafter and its drafts."""
        from decoder.gamma.auto import AutoGamma
        from decoder.gamma.base import FixedGamma
        from moesd_vllm.rounds import StepGamma

        longest = self.setup.max_gamma
        if isinstance(gamma, int):
            self.core.scheduler.choose_by(StepGamma(FixedGamma(gamma), [gamma]))
        else:
            self.ours = self.ours or StepGamma(AutoGamma(longest), range(longest + 1))
            self.core.scheduler.choose_by(self.ours)
        self.kept = kept
        drafter = self.core.model_executor.driver_worker.worker.model_runner.drafter
        if "propose" not in vars(drafter):
            drafter.propose = self._spoiling(drafter.propose)

    def _spoiling(self, propose: Any) -> Any:
        """The drafter's ``propose`` with some tokens turned into their neighbours."""
        import torch

        def spoilt(*args: Any, **kwargs: Any) -> Any:
            drafts = propose(*args, **kwargs)
            done = max((r.num_output_tokens for r in self.core.scheduler.running), default=0)
            part = min(done * len(self.kept) // self.length, len(self.kept) - 1)
            left = torch.rand(drafts.shape) < self.kept[part]
            return torch.where(left, drafts, drafts ^ 1)

        return spoilt

    def hello(self) -> dict[str, Any]:
        """The version, the threads, and the classes that compute the experts of vLLM's layers."""
        import torch

        return {
            "version": self.vllm.__version__,
            "threads": torch.get_num_threads(),
            "experts": self.llm.apply_model(experts_of)[0],
        }


def experts_of(model: Any) -> list[str]:
    """Names of the classes that compute the experts of a module of vLLM's."""
    methods = (getattr(module, "quant_method", None) for module in model.modules())
    kernels = (getattr(method, "moe_kernel", None) for method in methods)
    return sorted({type(kernel.fused_experts).__name__ for kernel in kernels if kernel})


def main(setup: SimpleNamespace) -> None:
    """Answer what ``VllmGenerate`` asks."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from bench.peers.worker import serve

    engine = Engine(setup)

    def answer(message: dict[str, Any]) -> dict[str, Any]:
        command = message.pop("command")
        if command == "run":
            return engine.run(message["prompts"], message["max_new_tokens"])
        if command == "choose":
            engine.choose(**message)
            return {}
        if command == "explain":
            return {"why": engine.ours.controller.explain()}
        return engine.hello()

    serve(answer)


if __name__ == "__main__":
    main(SimpleNamespace(**json.loads(sys.argv[1])))
