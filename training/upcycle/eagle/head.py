"""The EAGLE-3 head in plain PyTorch: definition, a start from the dense model, published files.

At position t the head reads three of the target's hidden states, fused by ``fc``, and the token
that follows; the target's own output rows, those of the draft vocabulary, turn what comes out into
logits for token t + 2. Drafting deeper, the head's output stands in for the fused states.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from training.eagle import MLP, Attention, RMSNorm

INNER = 1152  # what is left of the repository's room for assets
DROPOUT = 0.1  # a few passes over half a million tokens were learned by heart without it
LOWEST_LAYER = 2
LAYERS_FROM_TOP = 3


def feature_layers(layers: int) -> list[int]:
    """EAGLE-3's low, middle and high: indices into ``hidden_states`` of a target so deep."""
    return [min(LOWEST_LAYER, layers), layers // 2, max(layers - LAYERS_FROM_TOP, 0)]


def head_config(target, draft_vocab: int, inner: int = INNER) -> dict:
    """The published ``config.json`` of a head for the target of this transformers config."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": target.hidden_size,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": target.num_attention_heads,
        "num_key_value_heads": target.num_key_value_heads,
        "head_dim": target.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": target.rms_norm_eps,
        "rope_theta": target.rope_parameters["rope_theta"],
        "max_position_embeddings": target.max_position_embeddings,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": draft_vocab,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "eagle_aux_hidden_state_layer_ids": feature_layers(target.num_hidden_layers),
    }


class Layer(nn.Module):
    """A Llama layer that attends over the embedding beside the hidden state, each normed."""

    def __init__(self, config: dict):
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn = Attention(config, 2 * hidden)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.hidden_norm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)

    def forward(self, embeds: torch.Tensor, hidden: torch.Tensor, past: list) -> torch.Tensor:
        """Both ``[B, L, H]`` -> ``[B, L, H]``."""
        x = torch.cat([self.input_layernorm(embeds), self.hidden_norm(hidden)], dim=-1)
        hidden = hidden + self.self_attn(F.dropout(x, DROPOUT, self.training), past)
        x = self.post_attention_layernorm(hidden)
        return hidden + self.mlp(F.dropout(x, DROPOUT, self.training))


class Eagle3(nn.Module):
    """fc, one layer, final norm; embedding and output rows are the target's."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        hidden = config["hidden_size"]
        width = hidden * len(config["eagle_aux_hidden_state_layer_ids"])
        self.fc = nn.Linear(width, hidden, bias=False)
        self.midlayer = Layer(config)
        self.norm = RMSNorm(hidden, config["rms_norm_eps"])

    def depths(
        self, embeds: torch.Tensor, features: torch.Tensor, count: int
    ) -> list[torch.Tensor]:
        """What every draft depth puts out, after the final norm, for all positions at once.

        Args:
            embeds: ``[B, L, H]``, of token t + 1.
            features: ``[B, L, 3 * H]``, the target's at t.
            count: of depths.

        Returns:
            ``count`` tensors ``[B, L, H]`` that the output rows turn into logits for token t + 2.
            Depth d has been fed the d outputs before it, so its first d places mean nothing.
        """
        hidden = self.fc(features)
        past: list[tuple[torch.Tensor, torch.Tensor]] = []
        normed = []
        for _ in range(count):
            hidden = self.midlayer(embeds, hidden, past)
            normed.append(self.norm(hidden))
            hidden = F.pad(hidden, (0, 0, 1, 0))[:, :-1]
        return normed


@torch.no_grad()
def start_from_dense(head: Eagle3, dense) -> None:
    """Begin as the dense model's last layer, over its highest hidden state.

    The embedding's half of queries, keys and values begins as the first layer's, whose input it is.

    Args:
        head: of the dense model's attention shapes; its MLP may be narrower.
        dense: a transformers Llama.
    """
    hidden = head.config["hidden_size"]
    first, last, layer = dense.model.layers[0], dense.model.layers[-1], head.midlayer
    head.fc.weight.zero_()
    head.fc.weight[:, -hidden:].copy_(torch.eye(hidden))
    for name in ("q_proj", "k_proj", "v_proj"):
        halves = [getattr(source.self_attn, name).weight for source in (first, last)]
        getattr(layer.self_attn, name).weight.copy_(torch.cat(halves, dim=1))
    layer.self_attn.o_proj.weight.copy_(last.self_attn.o_proj.weight)
    layer.input_layernorm.weight.copy_(first.input_layernorm.weight)
    layer.hidden_norm.weight.copy_(last.input_layernorm.weight)
    layer.post_attention_layernorm.weight.copy_(last.post_attention_layernorm.weight)
    head.norm.weight.copy_(dense.model.norm.weight)
    gate, up, down = (getattr(last.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
    weight = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    kept = weight.topk(head.config["intermediate_size"]).indices.sort().values
    layer.mlp.gate_proj.weight.copy_(gate[kept])
    layer.mlp.up_proj.weight.copy_(up[kept])
    layer.mlp.down_proj.weight.copy_(down[:, kept])


def save_head(head: Eagle3, vocabulary: torch.Tensor, lm_head: torch.Tensor, out: Path) -> None:
    """Write ``config.json`` and a bf16 ``model.safetensors`` in the published layout.

    Args:
        head: the trained head.
        vocabulary: int64 ``[draft vocabulary]``, the target ids the head speaks, ascending.
        lm_head: ``[V, H]``, the target's output projection.
        out: the folder, made if need be.
    """
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    weights = {**head.state_dict(), "lm_head.weight": lm_head[vocabulary]}
    tensors = {
        name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in weights.items()
    }
    tensors["d2t"] = vocabulary - torch.arange(len(vocabulary))
    tensors["t2d"] = torch.zeros(len(lm_head), dtype=torch.bool).index_fill_(0, vocabulary, True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(head.config, indent=2) + "\n")
