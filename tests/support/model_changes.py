"""What owners do to a live causal LM of Qwen3's layout: each function changes its outputs."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune


def attention(model):
    return model.model.layers[1].self_attn


def other_weights(model):
    return {name: 1.2 * value + 0.01 for name, value in model.state_dict().items()}


class Lora(nn.Module):
    """An adapter as PEFT puts it in a linear layer's place."""

    def __init__(self, base):
        super().__init__()
        self.base, out = base, base.out_features
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.randn(out, 2))

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


class Halved(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 0.5 * self.inner(x)


def assign(model):
    model.load_state_dict(other_weights(model), assign=True)


def load(model):
    model.load_state_dict(other_weights(model))


def data_of_one(model):
    attention(model).q_proj.weight.data = 2 * attention(model).q_proj.weight.data


def data_of_all(model):
    for parameter in model.parameters():
        parameter.data = 1.2 * parameter.data


def data_in_place(model):
    attention(model).v_proj.weight.data.mul_(2)


def swapped(model):
    new = nn.Parameter(2 * attention(model).v_proj.weight.detach())
    torch.utils.swap_tensors(attention(model).v_proj.weight, new)


def key_bias(model):
    attention(model).q_proj.bias = nn.Parameter(torch.randn(attention(model).q_proj.out_features))


def output_projection(model):
    attention(model).o_proj.weight = nn.Parameter(2 * attention(model).o_proj.weight.detach())


def norm_weight(model):
    model.model.norm.weight = nn.Parameter(2 * torch.rand_like(model.model.norm.weight))


def embedding(model):
    new = nn.Embedding(*model.get_input_embeddings().weight.shape)
    model.set_input_embeddings(new)


def head(model):
    model.set_output_embeddings(nn.Linear(32, 64, bias=False))


def head_adapter(model):
    model.lm_head = Lora(model.lm_head)


def tied(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def value_adapter(model):
    attention(model).v_proj = Lora(attention(model).v_proj)


def mlp(model):
    model.model.layers[0].mlp = Halved(model.model.layers[0].mlp)


def activation(model):
    block = model.model.layers[0].mlp
    getattr(block, "experts", block).act_fn = nn.ReLU()


def router(model):
    block = model.model.layers[0].mlp
    if hasattr(block, "gate"):
        block.gate.top_k = 1
    else:
        block.gate_proj.weight.data = 2 * block.gate_proj.weight.data


def rotary(model):
    model.model.rotary_emb.inv_freq *= 0.5


def rotary_scaled(model):
    model.model.rotary_emb.attention_scaling = 0.5


def rotary_replaced(model):
    model.model.rotary_emb.inv_freq = 0.5 * model.model.rotary_emb.inv_freq


def scaling(model):
    attention(model).scaling *= 2


def weight_norm(model):
    parametrizations.weight_norm(attention(model).v_proj)
    with torch.no_grad():
        attention(model).v_proj.parametrizations.weight.original0.mul_(2)


def pruned(model):
    prune.l1_unstructured(attention(model).q_proj, "weight", amount=0.5)


def forward_of_attention(model):
    own = attention(model).forward

    def patched(*args, **kwargs):
        out, weights = own(*args, **kwargs)
        return 0.5 * out, weights

    attention(model).forward = patched


def class_of_attention(model):
    cls = type(attention(model))

    class Patched(cls):
        def forward(self, *args, **kwargs):
            out, weights = super().forward(*args, **kwargs)
            return 0.5 * out, weights

    attention(model).__class__ = Patched


class HalvedLinear(nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)


def class_of_linear(model):
    attention(model).v_proj.__class__ = HalvedLinear


def forward_of_root(model):
    own = model.forward

    def patched(*args, **kwargs):
        out = own(*args, **kwargs)
        out.logits = 0.5 * out.logits
        return out

    model.forward = patched


CHANGES = [
    assign, load, data_of_one, data_of_all, data_in_place, swapped, key_bias, output_projection,
    norm_weight, embedding, head, head_adapter, tied, value_adapter, mlp, activation, router,
    rotary, rotary_scaled, rotary_replaced, scaling, weight_norm, pruned, class_of_attention,
    class_of_linear, forward_of_attention, forward_of_root,
]  # fmt: skip
