"""The shipped pair: loads with plain ``from_pretrained``, is small, and fits together."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from decoder import embedded
from decoder.embedded.prompts import CODE_PROMPTS, PROSE_PROMPTS
from decoder.errors import UserError

MAX_BYTES = 24_000_000
EAGLE_TENSORS = {
    "fc.weight": [256, 512],
    "fc.bias": [256],
    "layers.0.self_attn.q_proj.weight": [256, 256],
    "layers.0.self_attn.k_proj.weight": [128, 256],
    "layers.0.self_attn.v_proj.weight": [128, 256],
    "layers.0.self_attn.o_proj.weight": [256, 256],
    "layers.0.post_attention_layernorm.weight": [256],
    "layers.0.mlp.gate_proj.weight": [512, 256],
    "layers.0.mlp.up_proj.weight": [512, 256],
    "layers.0.mlp.down_proj.weight": [256, 512],
}


@pytest.fixture(scope="module")
def pair():
    torch.set_num_threads(1)
    return embedded.load_pair()


def test_assets_are_small_enough():
    files = [f for f in embedded.ASSETS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= MAX_BYTES
    assert {f.name for f in files if f.suffix == ".safetensors"} == {"model.safetensors"}


def test_target_is_a_sparse_moe_in_bf16(pair):
    target, _, _ = pair
    config = target.config
    assert config.model_type == "qwen3_moe"
    assert (config.num_experts, config.num_experts_per_tok) == (32, 4)
    assert {p.dtype for p in target.parameters()} == {torch.bfloat16}


def test_pair_shares_its_vocabulary(pair):
    target, draft, tokenizer = pair
    assert target.config.vocab_size == draft.config.vocab_size == len(tokenizer) == 4096
    other = AutoTokenizer.from_pretrained(embedded.draft_path())
    assert other.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("path", [embedded.target_path, embedded.draft_path])
def test_generation_defaults_are_greedy_and_know_the_end(path, pair):
    generation = GenerationConfig.from_pretrained(path())
    assert not generation.do_sample
    assert generation.eos_token_id == pair[2].eos_token_id
    assert generation.pad_token_id == pair[2].pad_token_id


def test_target_and_draft_know_python(pair):
    """Both predict the obvious next token: the weights are trained ones, not an initialisation."""
    target, draft, tokenizer = pair
    ids = tokenizer("    def __init__(", return_tensors="pt").input_ids
    for model in (target, draft):
        with torch.no_grad():
            best = model(input_ids=ids).logits[0, -1].argmax().item()
        assert tokenizer.decode([best]) == "self"


def test_fp32_widens_the_same_weights(pair):
    model = AutoModelForCausalLM.from_pretrained(embedded.draft_path(), dtype=torch.float32)
    for (name, wide), (_, stored) in zip(
        model.named_parameters(), pair[1].named_parameters(), strict=True
    ):
        assert torch.equal(wide, stored.float()), name


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x\n",
        "\tif a:\r\n\t\tb = 'tab and CRLF'\r\n",
        "                deep = indentation  # 16 spaces\n\n\n\n",
        "naïve café — “quotes” … 你好 🎉 \u200b\u0301",
        " leading and trailing ",
        "",
        "\x00\x01\x7f",
        "x" * 300,
    ],
)
def test_tokenizer_round_trips(text, pair):
    tokenizer = pair[2]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_indentation_is_one_token(pair):
    tokenizer = pair[2]
    for spaces in (4, 8, 12, 16):
        pieces = tokenizer.tokenize("\n" + " " * spaces + "return x")
        assert len(pieces) == 4, pieces  # newline, the run but its last space, " return", " x"


def test_eagle_tensors_have_their_published_names():
    with safe_open(embedded.eagle_path() / "model.safetensors", "pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    assert shapes == EAGLE_TENSORS
    config = json.loads((embedded.eagle_path() / "config.json").read_text())
    assert config["hidden_size"] == 256
    assert config["bias"] is True


def test_prompts_are_enough_and_fit(pair):
    tokenizer = pair[2]
    assert len(CODE_PROMPTS) >= 8
    assert len(PROSE_PROMPTS) >= 4
    prompts = CODE_PROMPTS + PROSE_PROMPTS
    assert len(set(prompts)) == len(prompts)
    assert all(0 < len(tokenizer.encode(p)) < 256 for p in prompts)


def test_missing_assets_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "ASSETS", tmp_path)
    with pytest.raises(UserError, match="python -m training all"):
        embedded.target_path()
