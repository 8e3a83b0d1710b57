"""vLLM on the CPU as a peer: its engine in its own virtual environment, driven over pipes.

Run as a script this file is the worker and imports only what vLLM's environment has.
"""

from __future__ import annotations

import os
import sys
from typing import Any


class VllmGenerate:
    """Greedy autoregressive decoding by vLLM of a model saved on disk."""

    def __init__(self, python: str, model: str, threads: int, max_batch_size: int) -> None:
        from bench.peers.worker import Worker

        self.worker = Worker([python, __file__, model, str(max_batch_size)], threads)
        self.version = self.worker.ask(command="hello")["version"]

    def run(self, prompts: list[list[int]], max_new_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds of one call as the worker saw it, and the new tokens of each prompt."""
        answer = self.worker.ask(command="run", prompts=prompts, max_new_tokens=max_new_tokens)
        return answer["seconds"], answer["tokens"]

    def close(self) -> None:
        """End the worker."""
        self.worker.close()


def _serve(model: str, max_batch_size: int) -> None:
    import time
    from pathlib import Path

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import vllm

    from bench.peers.worker import serve

    engine = vllm.LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=max_batch_size,
        enforce_eager=True,
    )

    def answer(message: dict[str, Any]) -> dict[str, Any]:
        if message["command"] == "hello":
            return {"version": vllm.__version__}
        length = message["max_new_tokens"]
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in message["prompts"]]
        begin = time.perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "tokens": [list(o.outputs[0].token_ids) for o in outputs]}

    serve(answer)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
