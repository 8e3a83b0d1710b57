"""One layer call on up to ``MAX_PAIRS`` routed rows: workspaces, configuration, launches."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from moesd_kernels.experts.spec import ExpertsSpec, ExpertsWeights

from .combine_kernel import _combine_kernel
from .combine_norm import After, combine_norm
from .common import ACTIVATIONS, HAS_PDL, ROUTING_INLINE, ROUTING_PLANNED, ROUTING_SINGLE
from .config import select_config
from .device import device_of
from .down_kernel import _down_kernel
from .formats import matrices, stored_bits
from .gate_up_kernel import _gate_up_kernel
from .plan_kernel import max_blocks, plan, plan_sizes
from .single_kernel import _down_combine_kernel, _gate_up_single_kernel
from .types import LayerShape, LayerTiles, TileConfig

# A plan program reads all ids twice; more tokens than this go in several calls.
MAX_PAIRS = 16384


class Layer:
    """One call's weights and the flags the kernels are specialised on."""

    def __init__(self, weights: ExpertsWeights, spec: ExpertsSpec) -> None:
        w_gate_up, w_down = weights.gate_up, weights.down  # [E, 2I or I, H], [E, H, I]
        if spec.transposed:
            w_gate_up, w_down = w_gate_up.transpose(1, 2), w_down.transpose(1, 2)
        up_format, down_format = spec.formats
        capability = device_of(w_down.device).capability
        scale, bias = weights.gate_up_scale, weights.gate_up_bias
        self.gate_up = matrices(w_gate_up, scale, bias, up_format, capability)
        scale, bias = weights.down_scale, weights.down_bias
        self.down = matrices(w_down, scale, bias, down_format, capability)
        self.E, self.H, self.I = *w_down.shape[:2], self.down.depth
        self.weight_bits = stored_bits(up_format), stored_bits(down_format)
        self.gated = spec.gated
        limit, alpha = spec.activation_limit, spec.activation_alpha
        self.flags = {
            "ACTIVATION": ACTIVATIONS[spec.activation],
            "GATED": spec.gated,
            "INTERLEAVED": spec.interleaved,
            "HAS_LIMIT": limit is not None,
            "HAS_ALPHA": alpha is not None,
        }
        self.limit = 0.0 if limit is None else float(limit)
        self.alpha = 0.0 if alpha is None else float(alpha)

    def run(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        out: Tensor,
        batch_invariant: bool,
        config: LayerTiles | None,
        after: After | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Launch the layer on tokens x ``[T, H]``, 1 <= T * K <= MAX_PAIRS.

        With ``after`` its result is returned, and ``out`` is a workspace of one token's calls.
        """
        T, TOPK = ids.shape
        device = device_of(x.device)
        if config is None:
            shape = LayerShape(self.E, TOPK, self.H, self.I, T, self.gated, self.weight_bits)
            config = select_config(shape, x.dtype, device, batch_invariant=batch_invariant)
        pdl = HAS_PDL and x.is_cuda and device.capability >= 90
        pairs = T * TOPK
        act = torch.empty(pairs, self.I, dtype=x.dtype, device=x.device)
        if T == 1:
            self._run_single(x, act, ids, weights, out, batch_invariant, config, pdl)
            if after is None:
                return None
            return combine_norm(out, ids, weights, x, self.E, after, _pdl(pdl))
        bound = max_blocks(pairs, self.E, config.block_m)
        if pairs <= config.inline_pairs:
            table = torch.empty(pairs + 3 * bound, dtype=torch.int32, device=x.device)
            tables, routing = (table[:pairs], table[pairs:]), ROUTING_INLINE
        else:
            tables, routing = plan(ids, self.E, config.block_m, pdl), ROUTING_PLANNED
        self._gate_up(x, act, ids, tables, bound, routing, config.gate_up, pdl)
        partial = self._down(act, ids, tables, bound, ROUTING_PLANNED, config.down, pdl)
        if after is not None:
            return combine_norm(partial, ids, weights, x, self.E, after, _pdl(pdl))
        self._combine(partial, ids, weights, out, pdl)
        return None

    def _run_single(
        self,
        x: Tensor,
        act: Tensor,
        ids: Tensor,
        weights: Tensor,
        out: Tensor,
        batch_invariant: bool,
        config: LayerTiles,
        pdl: bool,
    ) -> None:
        """One token: no tables, and kernels of its own unless rows must be as in any batch.

        Transposed weights would be read in pieces of a few bytes by those kernels' narrow tiles.
        """
        tables, bound = (ids, ids), ids.shape[1]
        tile = config.single_gate_up
        if tile and not batch_invariant and self.gate_up.weight.stride(2) == 1:
            self._gate_up_single(x, act, ids, tile, pdl)
        else:
            self._gate_up(x, act, ids, tables, bound, ROUTING_SINGLE, config.gate_up, pdl)
        if not batch_invariant and self.down.weight.stride(2) == 1:
            self._down_combine(act, ids, weights, out, config.single_down, pdl)
            return
        partial = self._down(act, ids, tables, bound, ROUTING_SINGLE, config.down, pdl)
        self._combine(partial, ids, weights, out, pdl)

    def _gate_up(
        self,
        x: Tensor,
        act: Tensor,
        ids: Tensor,
        tables: tuple[Tensor, Tensor],
        bound: int,
        routing: int,
        config: TileConfig,
        pdl: bool,
    ) -> None:
        sizes = {"N_PAD": 0, "E_PAD": 0, "CHUNKS": 0}
        if routing == ROUTING_INLINE:
            sizes = plan_sizes(ids.numel(), self.E)
        w, scale, bias = self.gate_up.tensors()
        _gate_up_kernel[(bound * triton.cdiv(self.I, config.block_n),)](
            x,
            w,
            scale,
            w if bias is None else bias,
            act,
            ids,
            *tables,
            ids.numel(),
            bound,
            config.group_m,
            self.E,
            self.H,
            self.I,
            x.stride(0),
            *w.stride(),
            0 if bias is None else bias.stride(0),
            self.limit,
            self.alpha,
            TOPK=ids.shape[1],
            **sizes,
            ROUTING=routing,
            **self.flags,
            HAS_BIAS=bias is not None,
            **self.gate_up.constexprs,
            EVEN_K=self.H % config.block_k == 0,
            **config.constexprs(),
            # The first launch of a call may not start before the work of others is complete.
            **_pdl(pdl, first=routing != ROUTING_PLANNED),
            **config.options(),
        )

    def _down(
        self,
        act: Tensor,
        ids: Tensor,
        tables: tuple[Tensor, Tensor],
        bound: int,
        routing: int,
        config: TileConfig,
        pdl: bool,
    ) -> Tensor:
        """Returns partial sums ``[SPLIT_K, T * K, H]`` in fp32; rows of invalid ids are not
        written."""
        shape = (config.split_k, ids.numel(), self.H)
        partial = torch.empty(shape, dtype=torch.float32, device=act.device)
        w, scale, bias = self.down.tensors()
        steps = triton.cdiv(triton.cdiv(self.I, config.block_k), config.split_k)
        _down_kernel[(bound * triton.cdiv(self.H, config.block_n), config.split_k)](
            act,
            w,
            scale,
            w if bias is None else bias,
            partial,
            ids,
            *tables,
            ids.numel(),
            bound,
            config.group_m,
            self.E,
            self.H,
            self.I,
            *w.stride(),
            0 if bias is None else bias.stride(0),
            ROUTING=routing,
            HAS_BIAS=bias is not None,
            **self.down.constexprs,
            EVEN_K=config.split_k * steps * config.block_k == self.I,
            SPLIT_K=config.split_k,
            **config.constexprs(),
            **_pdl(pdl),
            **config.options(),
        )
        return partial

    def _combine(
        self, partial: Tensor, ids: Tensor, weights: Tensor, out: Tensor, pdl: bool
    ) -> None:
        T, TOPK = ids.shape
        block_h = min(512, max(64, triton.next_power_of_2(self.H)))
        _combine_kernel[(T, triton.cdiv(self.H, block_h))](
            partial,
            ids,
            weights,
            out,
            ids.numel(),
            self.E,
            self.H,
            out.stride(0),
            TOPK=TOPK,
            SPLIT_K=partial.shape[0],
            BLOCK_H=block_h,
            **_pdl(pdl),
            num_warps=2,
        )

    def _gate_up_single(
        self, x: Tensor, act: Tensor, ids: Tensor, config: TileConfig, pdl: bool
    ) -> None:
        w, scale, bias = self.gate_up.tensors()
        _gate_up_single_kernel[(ids.shape[1] * triton.cdiv(self.I, config.block_n),)](
            x,
            w,
            scale,
            w if bias is None else bias,
            act,
            ids,
            self.E,
            self.H,
            self.I,
            w.stride(0),
            w.stride(1),
            0 if bias is None else bias.stride(0),
            self.limit,
            self.alpha,
            **self.flags,
            HAS_BIAS=bias is not None,
            **self.gate_up.constexprs,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            STAGES=config.num_stages,
            **_pdl(pdl, first=True),
            num_warps=config.num_warps,
        )

    def _down_combine(
        self, act: Tensor, ids: Tensor, weights: Tensor, out: Tensor, config: TileConfig, pdl: bool
    ) -> None:
        w, scale, bias = self.down.tensors()
        _down_combine_kernel[(triton.cdiv(self.H, config.block_n),)](
            act,
            w,
            scale,
            w if bias is None else bias,
            out,
            ids,
            weights,
            self.E,
            self.H,
            self.I,
            w.stride(0),
            w.stride(1),
            0 if bias is None else bias.stride(0),
            TOPK=ids.shape[1],
            HAS_BIAS=bias is not None,
            **self.down.constexprs,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            STAGES=config.num_stages,
            **_pdl(pdl),
            num_warps=config.num_warps,
        )


def _pdl(on: bool, first: bool = False) -> dict[str, bool]:
    """Launch arguments of programmatic dependent launch; only Hopper and newer know the option."""
    return {"PDL": True, "launch_pdl": not first} if on else {"PDL": False}
