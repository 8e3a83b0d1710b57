"""Matrix products with a fixed order of sums, and with a gated MLP's activation behind them.

A result is the same, bit for bit, in any batch, in any order of rows, and whether its weight row
stands in a matrix of its own or in a joined one (q, k and v): ``linear_config`` says how. The
instruction's part in that (its width does not change the order in which it adds) is held by tests
marked ``gpu``. Not run on a GPU yet.

Dense matrices are small: tiles of 64 weight rows do not fill a device, so deep products are split
along K. The parts of a tile are summed by the program that finishes last, in the order of the parts
and not of their arrival. A second launch that sums them would take about as long, as either waits
for a store, a signal and a load; but it would count among a step's launches, and an activation
behind the sum would move there. What it has for itself is that it keeps no state: here every tile
has a counter, which the last program sets back to zero, so that a graph can be replayed. So two
split products must not run at the same time on one device; in one stream they do not.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesd_kernels.experts.triton.common import (
    ACTIVATIONS,
    activate,
    dot,
    pdl_wait,
    prefetch,
    tile_order,
)
from moesd_kernels.experts.triton.device import device_of

from .launch import check_floating, check_like, dependent_launch, rows_of
from .linear_config import MAX_SPLIT_TILES, Product, linear_tiles, part_columns

# No activation: a plain product.
PLAIN = -1
_PLAIN = tl.constexpr(PLAIN)
LINE_BYTES = tl.constexpr(128)
# Columns of a program's weights that are fetched while the launch before is still at work.
AHEAD = tl.constexpr(512)


@triton.jit
def _prefetch_weights(w_ptr, w_offsets, n_mask, depth):
    """Bring a program's first weights into L2, before the former launch is complete.

    No launch of a step writes weights; and a prefetch returns no value, so that a line that changes
    later is still read as it then is.
    """
    line: tl.constexpr = LINE_BYTES // (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
    k = tl.arange(0, AHEAD // line) * line
    valid = n_mask[:, None] & (k < depth)[None, :]
    prefetch(w_ptr + tl.where(valid, w_offsets[:, None] + k[None, :], 0))


@triton.jit
def _products(
    x_ptr,  # the tile's first row at its first column, likewise w_ptr
    w_ptr,
    x_offsets,  # [BLOCK_M] of rows
    w_offsets,  # [BLOCK_N]
    m_mask,
    n_mask,
    depth,
    part_k,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
    ONE_PART: tl.constexpr,
):
    """Sum of one part, or of all, over ``depth`` columns, in fp32: ``[BLOCK_N, BLOCK_M]`` if
    SWAP_AB, else ``[BLOCK_M, BLOCK_N]``.

    One loop for all parts: the pipeline does not drain between them.
    """
    BLOCK_M: tl.constexpr = x_offsets.shape[0]
    BLOCK_N: tl.constexpr = w_offsets.shape[0]
    offs_k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_M] if SWAP_AB else [BLOCK_M, BLOCK_N], tl.float32)
    part = total
    x_offsets = x_offsets[:, None] + offs_k[None, :]
    w_offsets = w_offsets[:, None] + offs_k[None, :]
    for k in range(0, depth, BLOCK_K):
        k_mask = tl.full([1, BLOCK_K], True, tl.int1) if EVEN_K else (k + offs_k < depth)[None, :]
        x_mask, w_mask = m_mask[:, None] & k_mask, n_mask[:, None] & k_mask
        x = tl.load(x_ptr + x_offsets, mask=x_mask, other=0.0, eviction_policy="evict_last")
        w = tl.load(w_ptr + w_offsets, mask=w_mask, other=0.0, eviction_policy="evict_first")
        part = dot(x, w, part, SWAP_AB)
        if not ONE_PART:
            ends = (k + BLOCK_K) % part_k == 0
            total = tl.where(ends, total + part, total)
            part = tl.where(ends, tl.zeros_like(part), part)
        x_ptr += BLOCK_K
        w_ptr += BLOCK_K
    return total + part


@triton.jit
def _is_last(part_sum, partial_ptrs, arrived_ptr, PARTS: tl.constexpr):
    """Whether all other parts of the tile are stored, once this one is.

    The atomic releases this program's part, which the barrier puts before it for all threads, and
    acquires the others'.
    """
    tl.store(partial_ptrs, part_sum)
    tl.debug_barrier()
    return tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == PARTS - 1


@triton.jit
def _finish(out, bias_ptr, column, N, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The sums ``[BLOCK_M, BLOCK_N]`` with bias, or activated: what a tile stores, in fp32."""
    dtype: tl.constexpr = bias_ptr.dtype.element_ty
    if ACTIVATION != _PLAIN:
        pairs = tl.reshape(out.to(dtype), [out.shape[0], out.shape[1] // 2, 2])
        gate, up = tl.split(pairs)
        gate = activate(gate.to(tl.float32), ACTIVATION).to(dtype)
        out = gate.to(tl.float32) * up.to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    return out


@triton.jit(do_not_specialize=["T"])
def _linear_kernel(
    x_ptr,  # [T, K]
    w_ptr,  # [N, K], or [2N, K] with an ACTIVATION
    bias_ptr,  # [N] or unused
    out_ptr,  # [T, N]
    partial_ptr,  # [tiles, PARTS, BLOCK_N * BLOCK_M] fp32 or, of one part, unused
    arrived_ptr,  # [tiles] int32, zero before and after; likewise
    T, N, K, stride_xt, stride_wn, part_k,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP_AB: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles, PARTS); a program one part of a tile or, PARTS = 1, all of them.

    With an activation the tile's weight rows are g0, u0, g1, u1, …, of the two halves of w.
    """
    WIDTH: tl.constexpr = BLOCK_N if ACTIVATION == _PLAIN else BLOCK_N // 2
    SIZE: tl.constexpr = BLOCK_M * BLOCK_N
    pid, part = tl.program_id(0), tl.program_id(1)
    block, tile = tile_order(pid, tl.cdiv(T, BLOCK_M), tl.cdiv(N, WIDTH), GROUP_M)
    m_first, n_first = block * BLOCK_M, tile * WIDTH
    row, w_row = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    # Only a tile's first row, and up from gate, can lie further than 2**31 away.
    k_begin = part * part_k
    x_ptr += m_first.to(tl.int64) * stride_xt + k_begin
    w_ptr += n_first.to(tl.int64) * stride_wn + k_begin
    if ACTIVATION == _PLAIN:
        w_offsets = w_row * stride_wn
    else:
        w_offsets = (w_row // 2 + w_row % 2 * N).to(tl.int64) * stride_wn
        w_row //= 2
    m_mask, n_mask = row < T - m_first, w_row < N - n_first
    depth = K if PARTS == 1 else tl.minimum(part_k, K - k_begin)
    if PDL:
        _prefetch_weights(w_ptr, w_offsets, n_mask, depth)
    pdl_wait(PDL)
    out = _products(
        x_ptr, w_ptr, row * stride_xt, w_offsets, m_mask, n_mask, depth, part_k,
        BLOCK_K, EVEN_K, SWAP_AB, PARTS > 1,
    )  # fmt: skip
    if PARTS > 1:
        COLUMNS: tl.constexpr = out.shape[1]
        place = tl.arange(0, SIZE // COLUMNS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        partial_ptrs = partial_ptr + pid * (PARTS * SIZE) + place
        if not _is_last(out, partial_ptrs + part * SIZE, arrived_ptr + pid, PARTS):
            return
        tl.store(arrived_ptr + pid, 0)
        out = tl.zeros_like(out)
        for i in tl.static_range(PARTS):  # loads go to L2, where the others' parts lie
            out += tl.load(partial_ptrs + i * SIZE, cache_modifier=".cg")
    column = n_first + tl.arange(0, WIDTH)
    out = _finish(tl.trans(out) if SWAP_AB else out, bias_ptr, column, N, ACTIVATION, HAS_BIAS)
    out_ptrs = out_ptr + m_first.to(tl.int64) * N + row[:, None] * N + column[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), m_mask[:, None] & (column < N)[None, :])


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    weight_format: str = "plain",
    int8_activations: bool = False,
) -> Tensor:
    """x times w transposed, plus bias: fp32 sums in an order fixed by K, the result in x.dtype.

    Args:
        x: ``[T, K]`` in float32, bfloat16 or float16, any strides.
        w: ``[N, K]`` in x.dtype, rows contiguous.
        bias: ``[N]`` in x.dtype, or None.
        scale: of other formats.
        weight_format: "plain"; the operator knows more of them on a CPU.
        int8_activations: of weights in integers, which are among those.

    Returns:
        ``[T, N]`` contiguous.

    Raises:
        TypeError, ValueError: dtypes or shapes differ from these.
        NotImplementedError: another format.
    """
    if scale is not None or weight_format != "plain":
        raise NotImplementedError(f"linear reads plain weights on a GPU, got {weight_format}")
    if bias is not None:
        check_like(bias, "bias", w.shape[:1], x.dtype)
    return _launch(x, w, bias, w.shape[0], PLAIN)


def gate_up(x: Tensor, w_gate_up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up`` of a dense MLP's joined projection, as transformers rounds it.

    Both products are rounded to x.dtype, then the activation, then its product with up.

    Args:
        x: ``[T, K]``, as for ``linear``.
        w_gate_up: ``[2I, K]`` in x.dtype, rows contiguous, the gate's first.
        activation: a key of ``experts.spec.activations.FUNCTIONS``.

    Returns:
        ``[T, I]`` contiguous.

    Raises:
        TypeError, ValueError: dtypes or shapes differ from these, or the activation is unknown.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    if w_gate_up.shape[0] % 2:
        raise ValueError(f"w_gate_up must be [2I, K], got {list(w_gate_up.shape)}")
    return _launch(x, w_gate_up, None, w_gate_up.shape[0] // 2, ACTIVATIONS[activation])


def _launch(x: Tensor, w: Tensor, bias: Tensor | None, N: int, activation: int) -> Tensor:
    check_floating(x, "x")
    if x.dim() != 2:
        raise ValueError(f"x must be [T, K], got {list(x.shape)}")
    T, K = x.shape
    check_like(w, "w", [w.shape[0], K], x.dtype)
    if w.stride(1) != 1:
        raise ValueError(f"rows of w must be contiguous, got strides {w.stride()}")
    out = torch.empty(T, N, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = rows_of(x)
    tile = linear_tiles(Product(T, w.shape[0], K, x.dtype), device_of(x.device))
    width = tile.block_n if activation == PLAIN else tile.block_n // 2
    tiles = triton.cdiv(T, tile.block_m) * triton.cdiv(N, width)
    partial, arrived = out, out
    if tile.split_k > 1:
        sizes = tiles, tile.split_k, tile.block_m * tile.block_n
        partial = torch.empty(sizes, dtype=torch.float32, device=x.device)
        arrived = _counters(x.device)
    _linear_kernel[(tiles, tile.split_k)](
        x,
        w,
        w if bias is None else bias.contiguous(),
        out,
        partial,
        arrived,
        T,
        N,
        K,
        x.stride(0),
        w.stride(0),
        part_columns(K),
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        EVEN_K=K % tile.block_k == 0,
        GROUP_M=tile.group_m,
        PARTS=tile.split_k,
        **tile.constexprs(),
        **tile.options(),
        **dependent_launch(x.device),
    )
    return out


@functools.cache
def _counters(device: torch.device) -> Tensor:
    """One counter a tile, zero between launches.

    Raises:
        RuntimeError: the first split product of a device is in a graph's capture, which would
            record the zeros and not write them.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run a product once before it is captured: its counters do not exist")
    return torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=device)
