"""Pieces shared by the Triton kernels: dot, epilogue, tile order, programmatic dependent launch."""

import triton
import triton.language as tl

try:  # Triton builds without these run the same kernels without the overlap.
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    HAS_PDL = True
except ImportError:
    HAS_PDL = False

# The keys of `experts.spec.activations.FUNCTIONS`; the kernels compare against the number.
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu2": 3, "relu": 4}

# Where a kernel finds its block's rows.
ROUTING_PLANNED = 0  # in the tables a former launch wrote
ROUTING_INLINE = 1  # computed here from topk_ids, and written for the launches that follow
ROUTING_SINGLE = 2  # one token: block k is pair k


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Wait for the former launch, then let the next one start its prologue.

    Triggering at once is safe because every dependent waits for this launch to *complete*.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch(ptrs):
    """Start fetching the cache lines at ``ptrs`` (global memory) into L2; nothing is waited for."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [ptrs.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def tile_order(pid, num_blocks, num_tiles, group_m):
    """Program number -> (block, tile): equal tiles of ``group_m`` blocks are adjacent."""
    group = pid // (group_m * num_tiles)
    first = group * group_m
    size = tl.minimum(num_blocks - first, group_m)
    within = pid - group * group_m * num_tiles
    return first + within % size, within // size


@triton.jit
def known_rows(block, ids_ptr, blocks_ptr, E, SINGLE: tl.constexpr):
    """(expert or -1, first sorted row, rows) of a block by a table, or of one token's pair."""
    if SINGLE:
        e = tl.load(ids_ptr + block).to(tl.int32)
        return tl.where(e < E, e, -1), block, 1
    else:
        entry = blocks_ptr + block * 3
        return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def bias_tile(bias_ptr, e, stride_be, offs_n, mask):
    """Bias of an expert's rows, as a ``[1, N]`` fp32 tile."""
    bias_ptrs = bias_ptr + e.to(tl.int64) * stride_be + offs_n
    return tl.load(bias_ptrs, mask=mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def dot(x, w, acc, SWAP_AB: tl.constexpr):
    """``acc += x @ w.T`` for x ``[M, K]``, w ``[N, K]``; acc is ``[N, M]`` when SWAP_AB, else
    ``[M, N]``.

    Swapped, the weights are the matrix instruction's M operand: Hopper's 64-row instruction is
    then full however few tokens there are. "ieee" keeps fp32 from being rounded to tf32, and adds
    one column after the other: a step's sum is taken by itself, or the error would grow with all
    columns. (A fused multiply-add by one: the compiler would put a plain sum back into the dot.)
    """
    if w.dtype == tl.float32:
        zero = tl.zeros_like(acc)
        if SWAP_AB:
            step = tl.dot(w, tl.trans(x), zero, input_precision="ieee")
        else:
            step = tl.dot(x, tl.trans(w), zero, input_precision="ieee")
        acc = tl.fma(step, tl.full(acc.shape, 1.0, tl.float32), acc)
    elif SWAP_AB:
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def tanh(x):
    """tanh by one exponential, exact at both ends."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation function on fp32 values; numbers as in ``ACTIVATIONS``."""
    if ACTIVATION == 0:
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == 1:
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == 2:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 3:
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    else:
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def glu(
    gate,
    up,
    limit,
    alpha,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
):
    """``act(gate) * up``, clamped; with alpha ``gate * sigmoid(alpha * gate) * (up + 1)``.

    Not GATED, ``gate`` is all there is and ``up`` may be anything.
    """
    if GATED:
        if HAS_LIMIT:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
        if HAS_ALPHA:
            out = gate / (1.0 + tl.exp(-alpha * gate)) * (up + 1.0)
        else:
            out = activate(gate, ACTIVATION) * up
    else:
        out = activate(gate, ACTIVATION)
    return out
