"""A differentiable expert layer for training: tokens sorted by expert.

transformers' own training path indexes and adds once per expert; on a CPU that costs more than the
products. Same arithmetic, registered under a name of its own, used only while training and
evaluating here.
"""

import torch
import torch.nn.functional as F

NAME = "training_sorted"


class SortedExperts(torch.autograd.Function):
    """rows ``[N, H]`` sorted by expert -> ``[N, H]``; ``counts`` says how many rows each expert
    owns."""

    @staticmethod
    def forward(ctx, rows, w_gate_up, w_down, counts):
        hidden = rows.new_empty(rows.shape[0], w_gate_up.shape[1])
        out = torch.empty_like(rows)
        for e, (r, h) in enumerate(zip(rows.split(counts), hidden.split(counts), strict=True)):
            torch.mm(r, w_gate_up[e].T, out=h)
        gate, up = hidden.chunk(2, dim=-1)
        activated = F.silu(gate) * up
        for e, (a, o) in enumerate(zip(activated.split(counts), out.split(counts), strict=True)):
            torch.mm(a, w_down[e].T, out=o)
        ctx.save_for_backward(rows, w_gate_up, w_down, hidden, activated)
        ctx.counts = counts
        return out

    @staticmethod
    def backward(ctx, grad):
        rows, w_gate_up, w_down, hidden, activated = ctx.saved_tensors
        counts = ctx.counts
        grad = grad.contiguous()
        d_gate_up, d_down = torch.empty_like(w_gate_up), torch.empty_like(w_down)
        d_act, d_rows = torch.empty_like(activated), torch.empty_like(rows)
        for e, (g, a, d) in enumerate(
            zip(grad.split(counts), activated.split(counts), d_act.split(counts), strict=True)
        ):
            torch.mm(g, w_down[e], out=d)
            torch.mm(g.T, a, out=d_down[e])
        gate, up = hidden.chunk(2, dim=-1)
        sig = torch.sigmoid(gate)
        silu = gate * sig
        d_hidden = torch.cat([d_act * up * (sig + silu * (1 - sig)), d_act * silu], dim=-1)
        for e, (h, r, d) in enumerate(
            zip(d_hidden.split(counts), rows.split(counts), d_rows.split(counts), strict=True)
        ):
            torch.mm(h, w_gate_up[e], out=d)
            torch.mm(h.T, r, out=d_gate_up[e])
        return d_rows, d_gate_up, d_down, None


def sorted_experts_forward(module, hidden_states, top_k_index, top_k_weights):
    """transformers experts interface: ``[T, H]``, ids and weights ``[T, K]`` -> ``[T, H]``."""
    tokens, k = top_k_index.shape
    order = top_k_index.flatten().argsort(stable=True)
    counts = torch.bincount(top_k_index.flatten(), minlength=module.num_experts).tolist()
    rows = hidden_states[order // k]
    out = SortedExperts.apply(rows, module.gate_up_proj, module.down_proj, counts)
    weighted = out * top_k_weights.flatten()[order, None]
    return weighted.new_zeros(tokens, hidden_states.shape[1]).index_add(0, order // k, weighted)


def register() -> str:
    """Register with transformers and return the name to pass as ``experts_implementation``."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, sorted_experts_forward)
    return NAME
