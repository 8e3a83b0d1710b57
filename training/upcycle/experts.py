"""The upcycled layer while it is trained: one dense FFN, and per expert a low-rank difference.

Expert e is the dense FFN with ``W + left_e @ right_e`` for each of its three matrices ("sparse
upcycling", Komatsuzaki et al. 2022, with low-rank differences). The dense products are shared by a
token's experts, so that a training step costs little more than the dense model's. Differences
start random and not at zero: experts that start equal get equal gradients.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

NUM_EXPERTS, TOP_K, RANK = 16, 2, 4
START = 0.1  # Frobenius norm of a difference at the start, relative to the matrix
START_LOGITS = 0.2  # spread of the router's logits at the start: nearly even weights
MATRICES = ("gate", "up", "down")


class LowRank(nn.Module):
    """The differences of one matrix, all experts: left ``[E, out, r]``, right ``[E, r, in]``."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        rows, columns = weight.shape
        # |left @ right| of independent normal entries is std_l * std_r * sqrt(out * in * r).
        std = (START * weight.float().norm() / (rows * columns * RANK) ** 0.5).sqrt().item()
        left, right = (NUM_EXPERTS, rows, RANK), (NUM_EXPERTS, RANK, columns)
        self.left = nn.Parameter(torch.randn(left, device=weight.device) * std)
        self.right = nn.Parameter(torch.randn(right, device=weight.device) * std)

    def narrow(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, in]`` -> ``[T, E * r]``."""
        return F.linear(x, self.right.flatten(0, 1))

    def widen(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, E * r]``, zero but for the chosen experts -> ``[T, out]``."""
        return F.linear(x, self.left.transpose(0, 1).flatten(1))


class UpcycledFFN(nn.Module):
    """Stands where a Llama layer's ``mlp`` stood.

    Args:
        mlp: the dense FFN, whose weights stay as they are.
        norm: ``[H]``, the weight of the norm before it, which sets the size of its inputs.

    Attributes:
        top_k: experts per token.
        probs: router probabilities fp32 ``[T, E]`` of the last forward, with their graph.
        chosen: experts int64 ``[T, top_k]`` of the last forward.
    """

    probs: torch.Tensor
    chosen: torch.Tensor

    def __init__(self, mlp: nn.Module, norm: torch.Tensor):
        super().__init__()
        self.dense: Any = mlp
        router = torch.randn(NUM_EXPERTS, len(norm), device=norm.device)
        self.router = nn.Parameter(router * (START_LOGITS / norm.float().norm()))
        self.differences: Any = nn.ModuleDict(
            {m: LowRank(getattr(mlp, f"{m}_proj").weight) for m in MATRICES}
        )
        self.top_k = TOP_K

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` -> ``[..., H]``."""
        x = hidden_states.flatten(0, -2)
        self.probs = F.linear(x.float(), self.router).softmax(-1)
        weights, self.chosen = self.probs.topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        gate, up, down = (self.differences[m] for m in MATRICES)
        gate_x, up_x = gate.narrow(x), up.narrow(x)
        dense_gate, dense_up = self.dense.gate_proj(x), self.dense.up_proj(x)
        activations, narrowed = torch.zeros_like(dense_gate), torch.zeros_like(gate_x)
        for k in range(self.top_k):
            mask = F.one_hot(self.chosen[:, k], NUM_EXPERTS).repeat_interleave(RANK, dim=1)
            mask = mask.to(gate_x.dtype)
            g = dense_gate + gate.widen(gate_x * mask)
            u = dense_up + up.widen(up_x * mask)
            a = F.silu(g) * u * weights[:, k, None].to(g.dtype)
            activations = activations + a
            narrowed = narrowed + down.narrow(a) * mask
        out = self.dense.down_proj(activations) + down.widen(narrowed)
        return out.view_as(hidden_states)


def balance_loss(layers: list[UpcycledFFN]) -> torch.Tensor:
    """Mean over layers of E * sum over experts of (share of choices * mean probability).

    1 when both are even (Fedus et al. 2021, "Switch Transformers", equation 4).
    """
    losses = []
    for layer in layers:
        share = F.one_hot(layer.chosen, NUM_EXPERTS).float().mean((0, 1))
        losses.append(NUM_EXPERTS * (share * layer.probs.mean(0)).sum())
    return torch.stack(losses).mean()


def upcycle(dense: Any, seed: int) -> list[UpcycledFFN]:
    """Replace every layer's FFN of a Llama model in place and freeze everything else."""
    torch.manual_seed(seed)
    dense.requires_grad_(False)
    for layer in dense.model.layers:
        layer.mlp = UpcycledFFN(layer.mlp, layer.post_attention_layernorm.weight)
    return [layer.mlp for layer in dense.model.layers]
