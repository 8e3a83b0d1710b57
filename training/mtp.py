"""A multi-token-prediction head for the target, by DeepSeek-V3's names and formula.

It is trained as the EAGLE head is and differs from it in what stands around its layer: norms on
both inputs and on the output, which takes the place of the target's last hidden state. The layer is
the target's own kind with a dense MLP.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.eagle import MLP, Attention, Eagle, RMSNorm

BATCH_ROWS = 2  # for minutes of training: of many small steps it learns more than of few large ones


class Layer(nn.Module):
    """Qwen3-MoE decoder layer whose MLP is dense."""

    def __init__(self, config: dict):
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn = Attention(config)
        self.self_attn.q_norm = RMSNorm(config["head_dim"], eps)
        self.self_attn.k_norm = RMSNorm(config["head_dim"], eps)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)

    def forward(self, x: torch.Tensor, past: list) -> torch.Tensor:
        """``[B, L, H]`` -> ``[B, L, H]``."""
        x = x + self.self_attn(self.input_layernorm(x), past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Mtp(Eagle):
    """Norms, projection, layer, norm; embedding and lm_head are the target's."""

    def __init__(self, config: dict):
        nn.Module.__init__(self)
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.enorm, self.hnorm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.layer = Layer(config)
        self.norm = RMSNorm(hidden, eps)

    def forward(self, embeds: torch.Tensor, features: torch.Tensor, past: list) -> torch.Tensor:
        """One depth: embeds of token[t+1], features[t] -> features[t+1], all ``[B, L, H]``."""
        pair = torch.cat([self.enorm(embeds), self.hnorm(features)], dim=-1)
        return self.norm(self.layer(self.eh_proj(pair), past))


def head_config(config: Any) -> dict:
    """What a head of a Qwen3-MoE target with this configuration is made by."""
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    names = (*sizes, "head_dim", "rms_norm_eps")
    return {n: getattr(config, n) for n in names} | {
        "rope_theta": config.rope_parameters["rope_theta"]
    }


def published_name(name: str, depth: int) -> str:
    """A parameter's name in a checkpoint whose target has ``depth`` layers."""
    name = f"shared_head.{name}" if name.startswith("norm.") else name.removeprefix("layer.")
    return f"model.layers.{depth}.{name}"


def save_mtp(model: Mtp, config: Any, out: Path) -> None:
    """Write the target's config.json and, in bf16, the head as the layer after its last."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        published_name(k, config.num_hidden_layers): v.detach().to("cpu", torch.bfloat16)
        for k, v in model.state_dict().items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    fields = config.to_diff_dict() | {"num_nextn_predict_layers": 1}
    (out / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def load_mtp(config: Any, path: Path) -> Mtp:
    """Read what ``save_mtp`` wrote, widened to fp32."""
    from safetensors.torch import load_file

    model, held = Mtp(head_config(config)), load_file(path / "model.safetensors")
    depth = config.num_hidden_layers
    model.load_state_dict({k: held[published_name(k, depth)].float() for k in model.state_dict()})
    return model.eval()
