"""GGUF files: the numbers that transformers unpacks, in the memory of the file."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hostile.gguf import LIST, TEXT, U32, Gguf
from transformers import AutoModelForCausalLM

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import build_drafter
from decoder.model.loading import load_model
from moesd_kernels import accelerate, available_backends, load_gguf
from moesd_kernels.formats import QuantizedLinear

pytest.importorskip("gguf", reason="the files are written with it")
from support.formats import gguf_file

pytestmark = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason="the CPU kernels cannot run here"
)
IDS = torch.arange(14).view(2, 7)
FILES: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "llama-q8_0": ("llama", {"": "q8_0"}, {}),
    "llama-q4_k": ("llama", {"": "q4_k", "output": "q6_k"}, {"tied": False}),
    "qwen2-q4_1": ("qwen2", {"": "q4_1"}, {}),
    "qwen2moe-q8_0": ("qwen2moe", {"": "q8_0"}, {"experts": 4}),
    "qwen3moe-q4_0": ("qwen3moe", {"": "q4_0"}, {"experts": 4}),
    # As llama.cpp's Q4_K_M has it, in one layer of two.
    "qwen3moe-mixed": (
        "qwen3moe",
        {"": "q4_k", "attn_v": "q6_k", "blk.1.ffn_down_exps": "q6_k"},
        {"experts": 4, "tied": False},
    ),
    # As its Q4_K_M has it where rows are no multiple of 256, and its Q5_K_M.
    "qwen2moe-q5_0": ("qwen2moe", {"": "q5_0", "ffn_down_exps": "q8_0"}, {"experts": 4}),
    "qwen3moe-q5_k": (
        "qwen3moe",
        {"": "q5_k", "down_exps": "q5_1", "attn_v": "q6_k"},
        {"experts": 4},
    ),
    "qwen2moe-mixed": ("qwen2moe", {"": "q4_0", "ffn_down_exps": "q8_0"}, {"experts": 4}),
}


@pytest.fixture(scope="module", params=FILES)
def file(request: Any, tmp_path_factory: Any) -> Path:
    architecture, kinds, sizes = FILES[request.param]
    path = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    return gguf_file.write_gguf(path, architecture, kinds, **sizes)


def unpacked(file: Path) -> Any:
    """transformers' own model of the file; it leaves the width of experts at its default."""
    pytest.importorskip("accelerate")  # which its loader needs
    return AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        trust_remote_code=False,
        **({"moe_intermediate_size": 256} if "moe" in file.name else {}),
        **({"shared_expert_intermediate_size": 512} if "qwen2moe" in file.name else {}),
    ).eval()


@torch.no_grad()
def test_packed_is_what_transformers_unpacks(file: Path) -> None:
    kept, theirs = load_gguf(file, torch.float32), unpacked(file)
    layers = [m for m in kept.modules() if isinstance(m, QuantizedLinear)]
    dense = 0 if "qwen3moe" in file.name else 3 * 2
    assert len(layers) == 4 * 2 + 1 + dense
    table = kept.get_input_embeddings().weight.nbytes
    assert sum(p.nbytes for p in kept.parameters()) - table < 1.05 * file.stat().st_size
    expected = theirs(IDS).logits
    torch.testing.assert_close(kept(IDS).logits, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(accelerate(kept)(IDS).logits, expected, rtol=1e-3, atol=1e-3)
    assert kept.generation_config.eos_token_id == 5


def test_speculative_outputs_are_the_models_own(file: Path) -> None:
    model = load_gguf(file)
    prompts, greedy = [[1, 2, 3], [9, 8]], SamplingParams(max_new_tokens=12, ignore_eos=True)

    def outputs(drafter: Any, gamma: int) -> list[list[int]]:
        decoder = SpeculativeDecoder(model, drafter, gamma, max_batch_size=2, max_length=64)
        return [output.token_ids for output in decoder.generate(prompts, greedy)]

    assert outputs(build_drafter("ngram", model), 3) == outputs(None, 0)


def test_gate_and_up_in_two_formats_are_unpacked_and_said(tmp_path: Path, caplog: Any) -> None:
    kinds = {"": "q8_0", "ffn_gate_exps": "q6_k"}
    file = gguf_file.write_gguf(tmp_path / "moe.gguf", "qwen3moe", kinds, experts=4)
    with caplog.at_level(logging.WARNING, logger="moesd_kernels"):
        model = load_gguf(file, torch.float32)
    assert "gate and up projections of the experts of 2 layers are unpacked" in caplog.text
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.dtype == torch.float32 and experts.down_proj.dtype == torch.uint8
    with torch.no_grad():
        torch.testing.assert_close(
            model(IDS).logits, unpacked(file)(IDS).logits, rtol=1e-3, atol=1e-3
        )


def test_blocks_are_not_saved_as_plain_weights(tmp_path: Path) -> None:
    file = gguf_file.write_gguf(tmp_path / "a.gguf", "qwen3moe", {"": "q8_0"}, experts=4)
    packed = load_gguf(file)
    with pytest.raises(NotImplementedError, match="GGUF blocks were kept cannot be saved"):
        packed.save_pretrained(tmp_path / "saved")
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(copied(IDS).logits, packed(IDS).logits)
        assert copied.to(torch.float32).dtype == torch.float32
    (tmp_path / "b.gguf").write_bytes(Gguf().bytes())
    plain, few = load_gguf(tmp_path / "b.gguf"), IDS[:, :4] % 8
    plain.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=False)
    assert torch.equal(again(few).logits, plain(few).logits)


def test_the_decoder_loads_the_file(file: Path) -> None:
    """As a target and as a draft, by its path."""
    model = load_model(file, packed=True)
    assert any(isinstance(m, QuantizedLinear) for m in model.modules())
    assert model.dtype == torch.bfloat16
    assert load_model(str(file), dtype="fp32").dtype == torch.float32


def test_sizes_that_contradict_the_metadata_are_said(tmp_path: Path) -> None:
    file = gguf_file.write_gguf(tmp_path / "a.gguf", "llama", {"": "q8_0"}, kv_heads=4)
    broken = bytearray(file.read_bytes())
    key = b"llama.attention.head_count_kv"
    at = broken.index(key) + len(key) + 4
    broken[at : at + 4] = (2).to_bytes(4, "little")
    file.write_bytes(broken)
    with pytest.raises(ValueError, match=r"attn_k.weight must be \(128, 256\) .*\(256, 256\)"):
        load_gguf(file)


def test_other_architectures_are_named(tmp_path: Path) -> None:
    file = gguf_file.write_gguf(tmp_path / "model.gguf", "falcon", {"": "q8_0"})
    with pytest.raises(ValueError, match=r"that are read are llama, .*, got 'falcon'"):
        load_gguf(file)


def test_frequencies_of_a_file_slow_the_rotary_embedding_down(tmp_path: Path) -> None:
    plain = gguf_file.write_gguf(tmp_path / "a.gguf", "llama", {"": "q8_0"})
    factors = torch.linspace(1, 8, 32)
    slowed = gguf_file.write_gguf(
        tmp_path / "b.gguf", "llama", {"": "q8_0"}, added={"rope_freqs.weight": factors}
    )
    before, after = (load_gguf(file).model.rotary_emb.inv_freq for file in (plain, slowed))
    assert torch.equal(after, before / factors)


def test_turns_and_messages_of_a_chat_end_a_text_too(tmp_path: Path) -> None:
    def ends(writer: Any) -> None:
        writer.add_eot_token_id(7)
        writer.add_eom_token_id(9)

    file = gguf_file.write_gguf(tmp_path / "a.gguf", "llama", {"": "q8_0"}, metadata=ends)
    assert load_gguf(file).generation_config.eos_token_id == [5, 7, 9]


def test_tokens_end_a_text_by_name_where_the_file_says_one_of_them(tmp_path: Path) -> None:
    """As in the first files of Llama 3's chats, whose turns end otherwise than their texts."""
    file, path = Gguf(), tmp_path / "a.gguf"
    tokens = ["<|end_of_text|>", "a", "b", "ab", "c", "<|start|>", "<|eot_id|>", "<|eom_id|>"]
    file.fields["tokenizer.ggml.tokens"] = (LIST, (TEXT, tokens))
    path.write_bytes(file.bytes())
    assert load_gguf(path).generation_config.eos_token_id == [0, 6, 7]
    del file.fields["tokenizer.ggml.tokens"]
    path.write_bytes(file.bytes())
    assert load_gguf(path).generation_config.eos_token_id == 0


def test_a_role_beyond_the_vocabulary_is_no_tokens(tmp_path: Path) -> None:
    """Padding, say, that a tokenizer has and the embedding has not."""
    file, path = Gguf(), tmp_path / "a.gguf"
    for role in ("padding", "bos", "eot"):
        file.fields[f"tokenizer.ggml.{role}_token_id"] = (U32, 8)
    path.write_bytes(file.bytes())
    config = load_gguf(path).config
    assert (config.vocab_size, config.pad_token_id, config.bos_token_id) == (8, None, None)
