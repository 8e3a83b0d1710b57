"""Child of test_fused_moe_triton.py: the peer's calls in Triton's interpreter, one JSON line each.

Run as ``python fused_moe_child.py FOLDER`` with TRITON_INTERPRET=1, from the repository's root.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, "")  # the script's own folder stands where the current one would

import torch

from bench.peers.fused_moe_triton import FusedMoeTriton
from bench.workloads.layer import make_batch, make_layer
from bench.workloads.shapes import Shape
from moesd_kernels import fused_experts

CPU = torch.device("cpu")
CASES = {  # shape -> tokens
    Shape(6, 2, 24, 20): (1, 2, 9, 40),  # tuned; from T = 1 on with an assignment
    Shape(40, 4, 40, 36): (1, 2, 3, 9),  # default tiles; without an assignment up to T = 2
    Shape(3, 3, 16, 8): (5,),  # every expert gets every token
    Shape(40, 1, 16, 8): (11,),  # most experts get none
}


def poison():
    """A value that was never written is seen in the result: a row and an expert like any other."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 1)

    torch.empty = poisoned


def main():
    torch.set_num_threads(1)
    poison()
    peer = FusedMoeTriton(Path(sys.argv[1]), "NVIDIA_H200")
    for shape, counts in CASES.items():
        for dtype in (torch.float32, torch.float16):
            layer = make_layer(shape, dtype, CPU, seed=0)
            for tokens in counts:
                batch = make_batch(shape, tokens, 1, "uniform", dtype, CPU, tokens, 1.0)
                inputs = batch.hidden, batch.topk_ids, batch.topk_weights
                theirs = peer(layer, *inputs).double()
                expected = fused_experts(
                    *(t.double() for t in (batch.hidden, layer.w_gate_up, layer.w_down)),
                    batch.topk_ids,
                    batch.topk_weights.double(),
                    backend="torch",
                )
                error = ((theirs - expected).norm() / expected.norm()).item()
                case = f"{shape} {dtype} T={tokens}"
                print(json.dumps({"case": case, "error": error, "eps": torch.finfo(dtype).eps}))


if __name__ == "__main__":
    main()
