"""Tiny random causal LMs of many transformers families, prompts, and the plainest decoding of them.

Nothing is downloaded, and weights are drawn here: they depend on no version of transformers.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

VOCAB = 64
MOE_VOCAB, EOS = 97, 5  # of `tiny_moe`

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
}
_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 16}
_LOCAL: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 4}

# Each family is here for something in its attention, router or cache that the others lack.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),  # the plain case
    "qwen2": ("Qwen2", {}),  # attention bias, layer_types
    "qwen3": ("Qwen3", {"head_dim": 16}),  # query and key norms, head_dim != H / heads
    "mistral": ("Mistral", {"sliding_window": 6}),  # window shorter than the sequences
    "gemma2": (  # score caps, alternating windows, logit cap, scaled embeddings
        "Gemma2",
        {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    ),
    "opt": (  # learned positions, no rotary embedding, ReLU
        "OPT",
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    ),
    "phi": ("Phi", {"partial_rotary_factor": 0.5}),  # partial rotary, parallel residual
    "mixtral": ("Mixtral", _LOCAL),
    "qwen2_moe": (  # shared expert, alternating dense layers
        "Qwen2Moe",
        {**_EXPERTS, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "head_dim": 8}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 4}),  # norms across heads
    "deepseek_v3": ("DeepseekV3", _MLA),  # latent attention: keys and values of unequal width
    "glm4_moe": (  # sigmoid router with groups, partial rotary
        "Glm4Moe",
        {**_MLA, "num_key_value_heads": 2, "head_dim": 8, "n_shared_experts": 1},
    ),
    "gpt_oss": (  # sinks, windows, expert biases, interleaved transposed weights
        "GptOss",
        {**_LOCAL, "head_dim": 8, "sliding_window": 6, "num_key_value_heads": 2},
    ),
    "phimoe": ("Phimoe", {"num_local_experts": 8, "num_experts_per_tok": 2}),  # sparse mixer
    "qwen3_next": (  # gated attention in all layers, zero-centred norms, a gated shared expert
        "Qwen3Next",
        {
            **_EXPERTS,
            "head_dim": 8,
            "shared_expert_intermediate_size": 16,
            "full_attention_interval": 1,
        },
    ),
    "ernie4_5_moe": (  # interleaved rotary embedding, router bias, dense first layer
        "Ernie4_5_Moe",
        {"moe_num_experts": 8, "moe_k": 4, "moe_intermediate_size": 16},
    ),
    "granitemoe": ("GraniteMoe", _LOCAL),  # multipliers on embeddings, residuals and logits
}


# Families whose experts the hooks recognise, sparse in every layer and with sizes that are no
# multiple of a vector's: what differs from the table above.
_SPARSE: dict[str, Any] = {
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
}
SPARSE_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 40},
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4},
    "gpt_oss": {},
    "deepseek_v3": {"n_shared_experts": 1, "qk_rope_head_dim": 8},
    "glm4_moe": {},
}


def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Any:
    """A random two-layer model, weights large enough that greedy output varies."""
    name, extra = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**_BASE, **extra, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    randomize(model, seed)
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("batched_mm")  # grouped_mm has no fp64
    return model.to(dtype).eval()


@torch.no_grad()
def randomize(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    for weight in parameters.values():
        if weight.ndim > 1:
            scale = 1.5 * weight.shape[-1] ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
        else:
            # Biases and norms away from 0 and 1, so that forgetting one shows.
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    for name, buffer in model.state_dict().items():
        # What corrects a router's choice of experts.
        if name not in parameters and buffer.is_floating_point() and buffer.ndim:
            scale = buffer.shape[-1] ** -0.5
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * scale)


def sparse_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of ``SPARSE_FAMILIES``, which the hooks are held to."""
    return tiny_model(family, dtype, **{**_SPARSE, **SPARSE_FAMILIES[family]})


def tiny_moe(seed: int = 0, layers: int = 2, dtype: torch.dtype = torch.float64) -> Any:
    """A Qwen3-MoE with an end of sequence, of a prime number of tokens.

    fp64 makes greedy comparisons independent of batch shapes; transformers' own attention would
    round to fp32.
    """
    return tiny_model(
        "qwen3_moe", dtype, seed,
        vocab_size=MOE_VOCAB, num_hidden_layers=layers, num_experts_per_tok=2,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=EOS,
        attn_implementation="sdpa",
    )  # fmt: skip


@torch.no_grad()
def perturbed(model: Any, seed: int = 1, scale: float = 0.08) -> Any:
    """A copy with noise in its weights, ``scale`` of their deviation: a draft that often agrees."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for weight in other.parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight += (scale * weight.std(correction=0) * noise).to(weight.dtype)
    return other


@torch.no_grad()
def greedy_reference(model: Any, prompt: list[int], count: int, eos: bool = True) -> list[int]:
    """The model's own greedy continuation: a full forward per token, no cache, fp32 arg-max.

    Args:
        model: a causal LM.
        prompt: its token ids.
        count: how many tokens to append.
        eos: stop after the model's end of sequence, where it has one.
    """
    ids = list(prompt)
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.float().argmax()))
        if eos and ids[-1] == model.config.eos_token_id:
            break
    return ids[len(prompt) :]


def random_prompts(count: int, seed: int = 0, low: int = 1, high: int = 12) -> list[list[int]]:
    """Prompts of ragged lengths in ``[low, high]``."""
    generator = torch.Generator().manual_seed(seed)
    return _draw(torch.randint(low, high + 1, (count,), generator=generator), 0, VOCAB, generator)


def ragged_prompts(count: int, seed: int = 0, longest: int = 12) -> list[list[int]]:
    """Prompts of ``tiny_moe`` without special tokens, of lengths 1..longest, the first of 1."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    lengths[0] = 1
    return _draw(lengths, EOS + 1, MOE_VOCAB, generator)


def _draw(lengths: Tensor, low: int, high: int, generator: torch.Generator) -> list[list[int]]:
    return [torch.randint(low, high, (n,), generator=generator).tolist() for n in lengths.tolist()]


class LetterTokenizer:
    """``tiny_moe``'s ids to characters one to one, as much of a tokenizer as the engine uses."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % MOE_VOCAB for c in text]}

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        kept = [i for i in ids if i > EOS or not skip_special_tokens]
        return "".join(chr(0x4E00 + i) for i in kept)  # distinct, multi-byte characters


def save_tokenizer(path: Path, words: list[str]) -> None:
    """A tokenizer on disk that knows these words, separated by spaces; the first is for others."""
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0])
    fast.save_pretrained(path)
