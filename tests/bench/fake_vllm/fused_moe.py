"""Stands in for vLLM's file of this name: the functions that are taken from it, with our own small
kernel of one row a program. Importing it must fail, as vLLM's does without its compiled parts.
"""

import functools
import json
import os
from typing import Any

import torch
import triton
import triton.language as tl
from no_such_package import envs, get_device_name_as_file_name, moe_align_block_size

COUNTED = envs.VLLM_BATCH_INVARIANT


@triton.jit
def write_zeros_to_output(c_ptr, column, mask):
    tl.store(c_ptr + column, tl.zeros_like(column).to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit
def fused_moe_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    weights_ptr,
    rows_ptr,
    experts_ptr,
    total_ptr,
    N,
    K,
    pairs,
    NAIVE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    top_k: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    N_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
):
    place = tl.program_id(0)
    if place >= tl.load(total_ptr):
        return
    expert = tl.load(experts_ptr + place // BLOCK_SIZE_M).to(tl.int64)
    if NAIVE:
        row = tl.where(place % BLOCK_SIZE_M == 0, place // BLOCK_SIZE_M, pairs)
    else:
        row = tl.load(rows_ptr + place)
    if row >= pairs:
        return
    n, k = tl.arange(0, N_PAD), tl.arange(0, K_PAD)
    if expert == -1:
        write_zeros_to_output(c_ptr + row * N, n, n < N)
        return
    a = tl.load(a_ptr + row // top_k * K + k, mask=k < K, other=0.0).to(tl.float32)
    b_ptrs = b_ptr + expert * N * K + n[:, None] * K + k[None, :]
    b = tl.load(b_ptrs, mask=(n[:, None] < N) & (k[None, :] < K), other=0.0).to(tl.float32)
    value = tl.sum(a[None, :] * b, 1)
    if WEIGHTED:
        value *= tl.load(weights_ptr + row).to(tl.float32)
    tl.store(c_ptr + row * N + n, value.to(c_ptr.dtype.element_ty), mask=n < N)


def invoke_fused_moe_triton_kernel(
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    A_scale: torch.Tensor | None,
    B_scale: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    sorted_token_ids: torch.Tensor | None,
    expert_ids: torch.Tensor,
    num_tokens_post_padded: torch.Tensor,
    mul_routed_weight: bool,
    top_k: int,
    config: dict[str, Any],
    compute_type: tl.dtype,
    **quantized: bool,
) -> None:
    assert A_scale is None and B_scale is None and not any(quantized.values())
    assert not mul_routed_weight or topk_weights is not None
    (N, K), pairs = B.shape[1:], len(A) * top_k
    block = config["BLOCK_SIZE_M"]
    places = pairs * block if sorted_token_ids is None else len(sorted_token_ids)
    fused_moe_kernel[(places,)](
        A,
        B,
        C,
        topk_weights,
        sorted_token_ids,
        expert_ids,
        num_tokens_post_padded,
        N,
        K,
        pairs,
        NAIVE=sorted_token_ids is None,
        WEIGHTED=mul_routed_weight,
        top_k=top_k,
        BLOCK_SIZE_M=block,
        N_PAD=triton.next_power_of_2(N),
        K_PAD=triton.next_power_of_2(K),
    )


def get_config_file_name(E: int, N: int, dtype: str | None) -> str:
    suffix = f",dtype={dtype}" if dtype else ""
    return f"E={E},N={N},device_name={get_device_name_as_file_name()}{suffix}.json"


@functools.lru_cache
def get_moe_configs(E: int, N: int, dtype: str | None) -> dict[int, Any] | None:
    path = os.path.join(os.path.dirname(__file__), "configs", get_config_file_name(E, N, dtype))
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return {int(tokens): config for tokens, config in json.load(file).items()}


def get_default_config(
    M: int, E: int, N: int, K: int, topk: int, dtype: str | None
) -> dict[str, int]:
    return {"BLOCK_SIZE_M": 4 if M <= 8 else 16}


def _prepare_expert_assignment(ids, config, num_tokens, top_k, num_experts, expert_map):
    assert expert_map is None
    if num_tokens * top_k * 4 > num_experts:
        return moe_align_block_size(ids, config["BLOCK_SIZE_M"], num_experts, expert_map)
    total = num_tokens * top_k * config["BLOCK_SIZE_M"]
    return None, ids.view(-1), torch.full((1,), total, dtype=torch.int32, device=ids.device)
