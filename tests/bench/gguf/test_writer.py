"""Files for llama.cpp: every value as it was, read back by the format's own reader and others."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from bench.gguf.writer import write_gguf
from bench.workloads.models import random_model
from decoder import embedded
from decoder.model.loading import load_tokenizer

gguf = pytest.importorskip("gguf")

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "num_experts_per_tok": 2,
}


def mixtral(**options):
    config = MixtralConfig(intermediate_size=96, num_local_experts=3, **SIZES | options)
    return random_model(config)


def qwen3(**options):
    fields = {"moe_intermediate_size": 32, "num_experts": 5, "norm_topk_prob": True}
    return random_model(Qwen3MoeConfig(**SIZES | fields | options))


def read(file):
    """Fields, and fp32 tensors by name."""
    reader = gguf.GGUFReader(file)
    tensors = {}
    for stored in reader.tensors:
        values = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type))
        tensors[stored.name] = values.reshape(*map(int, reversed(stored.shape)))
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


@pytest.mark.parametrize("tied", [True, False])
def test_a_mixtral_is_a_llama_with_experts(tmp_path, tied):
    model = mixtral(tie_word_embeddings=tied, rms_norm_eps=2e-5)
    assert not write_gguf(model, tmp_path / "m.gguf")
    fields, tensors = read(tmp_path / "m.gguf")
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    assert fields["general.architecture"] == "llama" and fields["llama.expert_count"] == 3
    assert fields["llama.feed_forward_length"] == 96 and fields["llama.expert_used_count"] == 2
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(2e-5)
    assert ("output.weight" in tensors) is not tied
    assert len(tensors) == 2 + (not tied) + 2 * 10
    for layer in range(2):
        theirs, ours = f"blk.{layer}.", f"model.layers.{layer}."
        gate_up = state[f"{ours}mlp.experts.gate_up_proj"]
        assert torch.equal(tensors[f"{theirs}ffn_gate_exps.weight"], gate_up[:, :96])
        assert torch.equal(tensors[f"{theirs}ffn_up_exps.weight"], gate_up[:, 96:])
        for part, name in (
            ("ffn_down_exps", "mlp.experts.down_proj"),
            ("ffn_gate_inp", "mlp.gate.weight"),
            ("attn_v", "self_attn.v_proj.weight"),
            ("attn_output", "self_attn.o_proj.weight"),
            ("ffn_norm", "post_attention_layernorm.weight"),
        ):
            assert torch.equal(tensors[f"{theirs}{part}.weight"], state[ours + name]), part
        # Rows 2i and 2i + 1 of a head are what transformers has at i and i + half a head.
        for part, heads in (("q", 4), ("k", 2)):
            stored = tensors[f"{theirs}attn_{part}.weight"].view(heads, 16, 64)
            weight = state[f"{ours}self_attn.{part}_proj.weight"].view(heads, 16, 64)
            assert torch.equal(stored[:, 0::2], weight[:, :8])
            assert torch.equal(stored[:, 1::2], weight[:, 8:])


def test_transformers_reads_a_qwen3_moe_back(tmp_path):
    pytest.importorskip("accelerate")  # transformers wants it for any such file
    model = qwen3()
    write_gguf(model, tmp_path / "m.gguf")
    back = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="m.gguf",
        dtype=torch.bfloat16,
        trust_remote_code=False,
        moe_intermediate_size=32,  # of a file's sizes the one that transformers does not read
    )
    assert back.config.num_experts == 5 and back.config.norm_topk_prob
    state = back.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(back(ids).logits, model(ids).logits)


def four_tokens(prefix=False):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "a": 1, "b": 2, "ab": 3}
    text = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    text.add_special_tokens(["<s>"])
    splits = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=prefix)]
    text.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return PreTrainedTokenizerFast(tokenizer_object=text, bos_token="<s>")


def test_tokens_only_where_llama_cpp_splits_text_alike(tmp_path):
    tokenizer, model = four_tokens(), mixtral()
    assert write_gguf(model, tmp_path / "m.gguf", tokenizer)
    fields, _ = read(tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.pre"] == "smollm" and fields["tokenizer.ggml.bos_token_id"] == 0
    assert fields["tokenizer.ggml.merges"] == ["a b"]
    assert fields["tokenizer.ggml.tokens"][:5] == ["<s>", "a", "b", "ab", "[PAD4]"]
    assert fields["tokenizer.ggml.token_type"][:5] == [3, 1, 1, 1, 5]
    assert len(fields["tokenizer.ggml.tokens"]) == 96
    assert not write_gguf(model, tmp_path / "m.gguf", load_tokenizer(embedded.target_path()))
    assert read(tmp_path / "m.gguf")[0]["tokenizer.ggml.model"] == "none"
    assert not write_gguf(model, tmp_path / "m.gguf", four_tokens(prefix=True))


def test_tokens_that_were_added_are_found_whole(tmp_path):
    tokenizer, file = four_tokens(), tmp_path / "m.gguf"
    tokenizer.add_tokens(["ba b", "<a>"])
    assert write_gguf(mixtral(), file, tokenizer)
    text = "abba b<a>ab<s>"
    assert load_tokenizer(file).encode(text) == tokenizer.encode(text) == [3, 4, 5, 3, 0]
    tokenizer.add_tokens([f"<{index}>" for index in range(96)])
    with pytest.raises(ValueError, match="the tokenizer has 102 tokens, the model 96"):
        write_gguf(mixtral(), file, tokenizer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mixtral(sliding_window=8), "'sliding_window': None.*'sliding_window': 8"),
        (lambda: qwen3(norm_topk_prob=False), "'norm_topk_prob': False"),
        (lambda: qwen3().float(), "must be in bf16, got torch.float32"),
        (lambda: random_model(embedded_draft()), "expected one of mixtral, qwen3_moe, got qwen3"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        write_gguf(make(), tmp_path / "m.gguf")


def embedded_draft():
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(embedded.draft_path(), trust_remote_code=False)
