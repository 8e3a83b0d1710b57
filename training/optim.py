"""Muon for the hidden matrices (per expert), AdamW for the rest; steps until a budget is spent."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

CHECKPOINT_SECONDS = 180
BAR = "{l_bar}{bar}| {elapsed} {postfix}"


def orthogonalize(grad: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration towards U V^T of [..., M, N] (Jordan et al. 2024, "Muon").

    In the gradient's type; under autocast in that one's.
    """
    device = grad.device.type
    low = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if low else grad.dtype
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = grad.shape[-2] > grad.shape[-1]
    x = grad.mT if tall else grad
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype).contiguous()
    stack = x.flatten(0, -3) if x.ndim > 2 else x[None]
    for _ in range(steps):
        gram = stack @ stack.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        stack = torch.baddbmm(stack, polynomial, stack, beta=a)
    x = stack.view_as(x)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized; a 3-D parameter is a stack of matrices (one per expert)."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(state["momentum"], group["momentum"]))
                scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * scale)


class Optimizers:
    """Muon for the matrices inside blocks; AdamW for embeddings, norms and routers."""

    def __init__(self, model: torch.nn.Module, muon_lr: float = 0.01, adam_lr: float = 2e-3):
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, p in model.named_parameters():
            hidden = p.ndim >= 2 and not any(
                s in name for s in ("embed_tokens", "lm_head", "mlp.gate.", "router")
            )
            (matrices if hidden else others).append(p)
        self.all = [
            Muon(matrices, lr=muon_lr),
            torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]
        self.params = matrices + others
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]

    def step(self, factor: float, clip: float = 1.0) -> float:
        """Clip, update at the peak rates times ``factor``, clear; return the gradient norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.params, clip)
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self) -> list[dict]:
        """State of both optimizers."""
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states: list[dict]) -> None:
        """Restore what ``state_dict`` returned."""
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)


class Budget:
    """Progress in ``[0, 1]`` through a budget of tokens (repeatable) or of minutes."""

    def __init__(self, minutes: float | None, tokens: int | None):
        if (minutes is None) == (tokens is None):
            raise ValueError(f"expected minutes or tokens, got minutes={minutes}, tokens={tokens}")
        self.minutes, self.tokens = minutes, tokens
        self.seconds_before, self.tokens_done = 0.0, 0
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds spent so far, over all resumed parts."""
        return self.seconds_before + time.monotonic() - self.start

    @property
    def progress(self) -> float:
        """Share of the budget that is used up, at most 1."""
        done = (
            self.tokens_done / self.tokens
            if self.tokens
            else self.seconds / (60 * (self.minutes or 1))
        )
        return min(1.0, done)

    def lr_factor(self, warmup: float = 0.01, decay_from: float = 0.35) -> float:
        """Linear warm-up, constant, linear decay to (almost) zero."""
        p = self.progress
        if p < warmup:
            return 0.05 + 0.95 * p / warmup
        return 1.0 if p < decay_from else max(0.01, (1 - p) / (1 - decay_from))


def spend(
    budget: Budget,
    log: Path,
    step: Callable[[], dict[str, float]],
    save: Callable[[], None] = lambda: None,
) -> None:
    """Train; a checkpoint every few minutes and at the end.

    Args:
        budget: how long.
        log: appended a line to at each step: tokens and seconds so far, and what ``step`` returns.
        step: one update; returns its numbers by name.
        save: writes a checkpoint.
    """
    saved = time.monotonic()
    with (
        log.open("a") as file,
        tqdm(total=100.0, desc=log.stem, bar_format=BAR, mininterval=5) as bar,
    ):
        while budget.progress < 1.0:
            numbers = {name: f"{value:.4f}" for name, value in step().items()}
            line = [f"{budget.tokens_done}", f"{budget.seconds:.0f}", *numbers.values()]
            file.write(" ".join(line) + "\n")
            file.flush()
            bar.n = 100 * budget.progress
            told = [f"{name} {value}" for name, value in numbers.items()]
            bar.set_postfix_str(" ".join([*told, f"tokens {budget.tokens_done / 1e6:.2f}M"]))
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save()
                saved = time.monotonic()
    save()
