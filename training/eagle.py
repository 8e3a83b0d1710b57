"""The EAGLE head: definition in plain PyTorch, training, EAGLE-1's published format.

At position t the head sees the target's feature_t and the token that follows it, and predicts
feature_{t+1}; the target's own lm_head turns that into logits for token_{t+2}. When drafting
deeper, predicted features stand in for true ones.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from training.attention import RMSNorm, chain_attention
from training.data import SEED
from training.optim import Budget, Optimizers, spend
from training.teacher import Rows, TeacherBatches, agreement, distillation_loss

BATCH_ROWS = 8
DEPTHS = 3
CONFIG = {
    "architectures": ["LlamaForCausalLMEagle"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "bias": True,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "eagle": {
        "version": 1,
        "feature": "target's last_hidden_state, after its final norm (hidden_states[-1])",
        "fc_input": "concat(embed_tokens(token[t+1]), feature[t]); the embedding comes first",
        "rope_position": "t, the feature's position",
        "input_layernorm": False,
        "output": "feature[t+1] before lm_head; no norm is applied to it",
        "embed_tokens": "target's",
        "lm_head": "target's",
    },
}


class Attention(nn.Module):
    """Llama attention; deeper draft steps see true keys up to where they branched off.

    ``inputs`` is the width of what it reads, where that is not the hidden size.
    """

    def __init__(self, config: dict, inputs: int | None = None):
        super().__init__()
        hidden, self.size = config["hidden_size"], config["head_dim"]
        inputs = inputs or hidden
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.theta = config["rope_theta"]
        self.q_proj = nn.Linear(inputs, self.heads * self.size, bias=False)
        self.k_proj = nn.Linear(inputs, self.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(inputs, self.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.size, hidden, bias=False)
        self.q_norm: nn.Module = nn.Identity()  # of each head, in layers that have them
        self.k_norm: nn.Module = nn.Identity()

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary embedding (half-split, as transformers) of ``[B, heads, L, D]`` from 0."""
        half = self.size // 2
        rates = self.theta ** (-torch.arange(half, device=x.device) / half)
        angles = torch.arange(x.shape[2], device=x.device)[:, None] * rates
        cos, sin = (t.repeat(1, 2).to(x.dtype) for t in (angles.cos(), angles.sin()))
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin

    def forward(
        self, x: torch.Tensor, past: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """One more draft depth for every position at once: x ``[B, L, H]`` -> ``[B, L, H]``.

        ``past`` holds the keys and values of the shallower depths, first the one over true
        features; this depth's are appended. The query at position t of depth d sees true keys up to
        t - d and, of each later depth m, the one key at t - (d - m).
        """
        rows, length, _ = x.shape
        q, k, v = (
            p(x).view(rows, length, -1, self.size).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        past.append((self.rotate(self.k_norm(k)), v))
        out = chain_attention(self.rotate(self.q_norm(q)) / self.size**0.5, past)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Gated feed-forward of Llama."""

    def __init__(self, config: dict):
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Llama decoder layer without a norm before attention, as EAGLE-1 has it."""

    def __init__(self, config: dict):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.post_attention_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, x: torch.Tensor, past: list) -> torch.Tensor:
        """``[B, L, H]`` -> ``[B, L, H]``."""
        x = x + self.self_attn(x, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Eagle(nn.Module):
    """fc, one layer; embedding and lm_head are the target's."""

    def __init__(self, config: dict = CONFIG):
        super().__init__()
        self.fc = nn.Linear(2 * config["hidden_size"], config["hidden_size"], bias=True)
        self.layers = nn.ModuleList([Layer(config)])

    def forward(self, embeds: torch.Tensor, features: torch.Tensor, past: list) -> torch.Tensor:
        """One depth: embeds of token[t+1], features[t] -> features[t+1], all ``[B, L, H]``."""
        return self.layers[0](self.fc(torch.cat([embeds, features], dim=-1)), past)

    def depths(
        self, embeds: torch.Tensor, features: torch.Tensor, count: int
    ) -> list[torch.Tensor]:
        """Predictions of depths 0..count-1; depth d+1 reads depth d's output one place on.

        The first d positions of depth d have no predecessor and are not meaningful.
        """
        past: list = []
        predicted = []
        for _ in range(count):
            features = self(embeds, features, past)
            predicted.append(features)
            features = F.pad(features, (0, 0, 1, 0))[:, :-1]
        return predicted


Head = TypeVar("Head", bound=Eagle)


def train_head(
    kind: str,
    new: Callable[[], Head],
    teacher,
    tokenizer,
    run_dir: Path,
    budget: Budget,
    device: str = "cpu",
) -> Head:
    """Smooth L1 on features plus cross entropy against the target, over DEPTHS depths.

    ``new`` makes the head, ``kind`` is its name for the log.
    """
    torch.manual_seed(SEED)
    model = new().to(device).train()
    optimizers = Optimizers(model)
    batches = TeacherBatches(run_dir)
    lm_head = teacher.get_output_embeddings().weight

    def step() -> dict[str, float]:
        rows = batches.batch(BATCH_ROWS, device)
        # Shallow first: deeper depths only make sense once the first one predicts something.
        depths = min(DEPTHS, 1 + int(budget.progress * DEPTHS))
        loss, agree = eagle_loss(model, rows, lm_head, depths, tokenizer.pad_token_id)
        loss.backward()
        optimizers.step(budget.lr_factor(decay_from=0.3))
        budget.tokens_done += rows.ids.numel()
        return {"loss": loss.item()} | {f"agree {d}": share for d, share in enumerate(agree, 1)}

    log = run_dir / f"{kind}.log"
    log.unlink(missing_ok=True)
    spend(budget, log, step)
    return model


def eagle_loss(
    model: Eagle, rows: Rows, lm_head: torch.Tensor, depths: int, pad: int
) -> tuple[torch.Tensor, list[float]]:
    """Mean loss over depths, and the arg-max agreement of each depth."""
    embeds = F.embedding(rows.ids[:, 1:], lm_head)
    following = Rows(*(t[:, 1:] for t in rows.tensors()))
    total, agree = embeds.new_zeros(()), []
    for depth, predicted in enumerate(model.depths(embeds, rows.features[:, :-1], depths)):
        real = following.ids != pad
        real[:, :depth] = False
        logits = predicted @ lm_head.T
        distance = F.smooth_l1_loss(predicted, following.features, reduction="none").mean(-1)
        total = total + distillation_loss(logits, following.top_ids, following.top_probs, real)
        total = total + (distance * real).sum() / real.sum()
        agree.append(round(agreement(logits, following.top_ids, real), 4))
    return total / depths, agree


def save_eagle(model: Eagle, out: Path) -> None:
    """Write config.json and bf16 model.safetensors with EAGLE-1's tensor names."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def load_eagle(path: Path) -> Eagle:
    """Read what ``save_eagle`` wrote, widened to fp32."""
    from safetensors.torch import load_file

    model = Eagle(json.loads((path / "config.json").read_text()))
    model.load_state_dict({k: v.float() for k, v in load_file(path / "model.safetensors").items()})
    return model.eval()
