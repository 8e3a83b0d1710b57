"""Files read as models: the numbers that were written, and blocks where they are quantised."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig, Qwen3MoeConfig

from bench.gguf.contents import contents_of
from bench.gguf.writer import write_gguf
from bench.workloads.models import random_model
from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import build_drafter
from moesd_kernels import load_gguf
from moesd_kernels.formats import dequantize

gguf = pytest.importorskip("gguf")

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "num_experts_per_tok": 2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
IDS = torch.arange(11)[None]


def mixtral():
    return MixtralConfig(intermediate_size=96, num_local_experts=3, rms_norm_eps=2e-5, **SIZES)


def qwen3():
    fields = {"moe_intermediate_size": 32, "num_experts": 5, "norm_topk_prob": True}
    return Qwen3MoeConfig(**SIZES | fields | {"tie_word_embeddings": True})


@pytest.fixture(params=[mixtral, qwen3])
def written(request, tmp_path):
    """A model and its file."""
    model = random_model(request.param())
    write_gguf(model, tmp_path / "m-bf16.gguf")
    return model, tmp_path / "m-bf16.gguf"


def quantised(file, name):
    """What llama-quantize makes of a file: matrices but the router in a type, the rest as it is."""
    source, target = gguf.GGUFReader(file), file.with_name(f"m-{name}.gguf")
    kind = gguf.GGMLQuantizationType[name.upper()]
    architecture = source.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for key, field in source.fields.items():
        if key.startswith(architecture):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in source.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        values = values.reshape([int(size) for size in reversed(tensor.shape)])
        if values.ndim > 1 and "gate_inp" not in tensor.name:
            writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, values)
    for step in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{step}")()
    writer.close()
    return target


def test_what_was_written_is_read(written):
    model, file = written
    back = load_gguf(file)
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    with torch.inference_mode():
        assert torch.equal(back(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_blocks_stay_blocks_and_mean_what_they_stand_for(written, name):
    model, file = written
    file = quantised(file, name)
    assert contents_of(file).weight_format == name
    packed = load_gguf(file, torch.float32)
    # The embedding becomes numbers, though a tied head's blocks lie beside them.
    embedding = packed.model.embed_tokens.weight.nbytes
    held = sum(parameter.nbytes for parameter in packed.parameters()) - embedding
    assert held < file.stat().st_size
    model = model.float()
    state = model.state_dict()
    for key, stored in packed.state_dict().items():
        blocks = stored.dtype == torch.uint8
        state[key] = dequantize(stored, None, name, torch.float32) if blocks else stored
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(state["lm_head.weight"])
    model.load_state_dict(state)
    with torch.inference_mode():
        torch.testing.assert_close(packed(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_packed_target_verifies_what_it_decodes(written):
    _, file = written
    target = load_gguf(quantised(file, "q8_0"), torch.float32)
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    prompts = [[1, 2, 3, 1, 2], [5, 6, 5, 6, 5, 6]]
    plain, drafted = (
        SpeculativeDecoder(target, drafter=drafter, gamma=gamma).generate(prompts, params)
        for drafter, gamma in ((None, 0), (build_drafter("ngram", target), 2))
    )
    assert [list(o.token_ids) for o in plain] == [list(o.token_ids) for o in drafted]


def test_what_is_not_read_is_said(written):
    _, file = written
    with pytest.raises(
        ValueError, match=r"is mxfp4, read are f32, f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0"
    ):
        load_gguf(quantised(file, "mxfp4"))
