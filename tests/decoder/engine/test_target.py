"""The model that a decoder is given: what is left as it was, what is said, what is refused."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from support.tiny import random_prompts, tiny_model
from torch import nn

from decoder import SpeculativeDecoder
from decoder.drafters import NgramDrafter, SelfDrafter
from decoder.drafters.independent import IndependentDrafter
from decoder.engine.target import unwrapped
from decoder.errors import UserError
from decoder.model.runner import ModelRunner
from moesd_kernels import accelerate

PROMPTS = random_prompts(3, low=4)
OPTIONS = {"gamma": 2, "max_batch_size": 2, "max_length": 40}


def build(family="qwen3_moe", **changes):
    sdpa = {} if family == "gpt_oss" else {"attn_implementation": "sdpa"}
    return tiny_model(family, **sdpa, **changes)


def state(model):
    """What of a model and of the process a decoder could have moved."""
    config = model.config
    names = ("forward", "training", "_forward_hooks", "_forward_pre_hooks", "_moesd_settings")
    modules = [{k: v for k, v in vars(m).items() if k in names} for m in model.modules()]
    return {
        "process": (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()),
        "random": torch.get_rng_state().tolist(),
        "implementations": (config._experts_implementation, config._attn_implementation),
        "config": (config.to_dict(), model.generation_config.to_dict()),
        "modules": copy.copy(modules),
        "parameters": [(id(p), p.requires_grad, p.is_inference()) for p in model.parameters()],
        "values": [p.detach().clone().tolist() for p in model.parameters()],
    }


DRAFTERS = {
    "none": lambda: None,
    "ngram": NgramDrafter,
    "self": lambda: SelfDrafter(1),
    "independent": lambda: IndependentDrafter(tiny_model("qwen3", seed=1)),
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_building_a_decoder_moves_nothing_but_what_it_says(name):
    model, drafter = build().train(), DRAFTERS[name]()
    before = state(model)
    SpeculativeDecoder(model, drafter, **OPTIONS)
    after = state(model)
    # The kernels: what ``accelerate`` says in its line.
    assert after.pop("implementations") == ("moesd", before.pop("implementations")[1])
    forwards = [modules.pop("modules") for modules in (before, after)]
    for module in (*forwards[0], *forwards[1]):
        module.pop("forward", None)
    assert forwards[0] == forwards[1]
    assert before == after


class Fp8Experts(nn.Module):
    """As transformers' own: marked as experts, with weights of a byte each."""

    def __init__(self, config):
        super().__init__()
        self.config, self.is_concatenated, self.is_transposed = config, True, False
        weight = torch.zeros(4, 8, 8).to(torch.float8_e4m3fn)
        self.gate_up_proj = nn.Parameter(weight, requires_grad=False)

    def forward(self, hidden, index, weights):
        raise RuntimeError("expected a GPU of compute capability 8.9, got cpu")


def quantise(model):
    model.model.layers[1].mlp.experts = Fp8Experts(model.config)


def chunked(model):
    model.config.layer_types = ["chunked_attention"] * model.config.num_hidden_layers


@pytest.mark.parametrize(
    ("prepare", "drafter", "options", "error", "message"),
    [
        (None, SelfDrafter(100), {}, UserError, "top_k must be below"),
        (None, None, {"max_length": 10**6}, UserError, "1000000"),
        (None, None, {"verifier": "quick"}, ValueError, "quick"),
        (quantise, None, {}, UserError, "RuntimeError: expected a GPU"),
        (chunked, None, {}, UserError, "chunked_attention"),
    ],
    ids=["drafter", "length", "verifier", "fp8", "chunked"],
)
def test_a_refusal_leaves_the_model_as_found(prepare, drafter, options, error, message, caplog):
    model = build()
    if prepare is not None:
        prepare(model)
    found = state(model)
    with pytest.raises(error, match=message):
        SpeculativeDecoder(model, drafter, **{**OPTIONS, **options})
    assert state(model) == found
    assert "grouped_mm" not in caplog.text


def test_an_interrupt_leaves_the_model_as_found():
    model = build()
    found = state(model)
    interrupted = mock.patch.object(ModelRunner, "_probe", side_effect=KeyboardInterrupt)
    with interrupted, pytest.raises(KeyboardInterrupt):
        SpeculativeDecoder(model, **OPTIONS)
    assert state(model) == found


def test_what_its_owner_had_accelerated_stays_so():
    model = accelerate(build(), backend="torch")
    found = state(model)
    with pytest.raises(UserError):
        SpeculativeDecoder(model, SelfDrafter(100), **OPTIONS)
    assert state(model) == found


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3", "gpt_oss"])
def test_a_model_with_a_decoder_can_be_stored_copied_and_converted(family, tmp_path):
    model = build(family)
    outputs = lambda model: [
        o.token_ids for o in SpeculativeDecoder(model, **OPTIONS).generate(PROMPTS)
    ]
    expected = outputs(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    model.save_pretrained(tmp_path)
    experts = {"experts_implementation": "batched_mm"} if family != "qwen3" else {}
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stored, weights_only=False),
        type(model).from_pretrained(tmp_path, **experts).eval(),
        copy.deepcopy(model).bfloat16().float(),
    ]
    # Values that bf16 has rounded are other weights.
    assert [outputs(twin) for twin in copies[:-1]] == [expected] * 4
    rounded = build(family).bfloat16().float()
    assert outputs(copies[-1]) == outputs(rounded)
    assert outputs(model) == expected


def test_decoders_of_one_model_do_not_add_up():
    model = build()
    results, sizes = [], []
    for _ in range(3):
        decoder = SpeculativeDecoder(model, SelfDrafter(1), **OPTIONS)
        results.append([o.token_ids for o in decoder.generate(PROMPTS)])
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        sizes.append((sum(map(len, storages.values())), sum(hooks)))
    assert results[0] == results[1] == results[2]
    assert set(sizes) == {(sum(p.nbytes for p in model.parameters()), 0)}


class Linear8bitLt(nn.Linear):
    """As bitsandbytes', by its name."""


def warnings(caplog):
    records = [r for r in caplog.records if "depend on what is decoded beside" in r.getMessage()]
    return [record.getMessage().partition(": ")[2] for record in records]


def test_what_depends_on_the_batch_is_named_in_one_warning(caplog):
    model = build()
    for layer in model.model.layers:
        old = layer.self_attn.o_proj
        layer.self_attn.o_proj = Linear8bitLt(old.in_features, old.out_features, bias=False)
    SpeculativeDecoder(model, **OPTIONS)
    assert warnings(caplog) == ["model.layers.0.self_attn.o_proj (Linear8bitLt) and 1 more modules"]


class Wrapped(nn.Module):
    """An MLP followed by something that is different in training."""

    def __init__(self, inner, last):
        super().__init__()
        self.inner, self.last = inner, last

    def forward(self, x):
        return self.last(self.inner(x).transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("built", [False, True], ids=["before", "after"])
def test_dropout_in_training_is_refused(built):
    model = build("qwen3")
    model.model.layers[1].mlp = Wrapped(model.model.layers[1].mlp, nn.Dropout(0.5)).eval()
    decoder = SpeculativeDecoder(model, **OPTIONS)
    decoder.generate(PROMPTS)
    model.train()
    with pytest.raises(
        UserError, match=r"mlp\.last \(Dropout\) is in training and drops at random"
    ):
        if built:
            zero = torch.zeros(1, 1, dtype=torch.long)
            decoder.runner.forward(zero, zero[0], zero)
        else:
            SpeculativeDecoder(model, **OPTIONS)
    model.eval()
    decoder.generate(PROMPTS)


def test_batch_norms_are_named_when_training_begins(caplog):
    model = build("qwen3")
    norm = nn.BatchNorm1d(model.config.hidden_size)
    model.model.layers[1].mlp = Wrapped(model.model.layers[1].mlp, norm).eval()
    decoder = SpeculativeDecoder(model, **OPTIONS)
    decoder.generate(PROMPTS)
    assert warnings(caplog) == []
    model.train()
    places = torch.arange(3)[None]
    decoder.runner.forward(places + 5, torch.zeros(1, dtype=torch.long), places)
    assert warnings(caplog) == ["model.layers.1.mlp.last (BatchNorm1d)"]
    SpeculativeDecoder(build("qwen3").train(), **OPTIONS)
    assert len(warnings(caplog)) == 1


def test_a_compiled_wrapper_is_taken_off_in_one_line(caplog):
    caplog.set_level(logging.INFO)
    model = build("qwen3")
    expected = [o.token_ids for o in SpeculativeDecoder(model, **OPTIONS).generate(PROMPTS)]
    decoder = SpeculativeDecoder(torch.compile(model), **OPTIONS)
    assert [o.token_ids for o in decoder.generate(PROMPTS)] == expected
    assert "decoding with the Qwen3ForCausalLM inside OptimizedModule" in caplog.text
    model.model.layers[0].compile()
    with pytest.raises(UserError, match=r"model\.layers\.0 is compiled"):
        SpeculativeDecoder(model, **OPTIONS)


class PeftModelForCausalLM(nn.Module):
    """As PEFT's: adapters have been put into the model's own layers, or tokens go before it."""

    def __init__(self, model, prompt_learning):
        super().__init__()
        self.inner = model
        self.active_peft_config = SimpleNamespace(is_prompt_learning=prompt_learning)

    def get_base_model(self):
        return self.inner


def test_adapters_of_peft_are_followed_or_refused():
    model = build("qwen3")
    assert unwrapped(torch.compile(PeftModelForCausalLM(model, False))) is model
    with pytest.raises(UserError, match="puts tokens before the prompt"):
        SpeculativeDecoder(PeftModelForCausalLM(model, True), **OPTIONS)


def test_device_hooks_are_heeded(caplog):
    """As the accelerate library's, which shadows the forward of each module that it moves."""
    caplog.set_level(logging.INFO)
    model, calls = build("qwen3"), []
    expected = [o.token_ids for o in SpeculativeDecoder(model, **OPTIONS).generate(PROMPTS)]
    for module in (model, *model.model.layers):
        module._hf_hook, own = SimpleNamespace(), module.forward

        def counted(*args, _own=own, **kwargs):
            calls.append(1)
            return _own(*args, **kwargs)

        module.forward = counted
    decoder = SpeculativeDecoder(model, **OPTIONS)
    calls.clear()
    assert [o.token_ids for o in decoder.generate(PROMPTS)] == expected
    assert len(calls) >= 3 * len(PROMPTS)
    assert "Qwen3ForCausalLM has accelerate's hooks and runs module by module" in caplog.text
    model.model.layers[1].to("meta")
    with pytest.raises(UserError, match="is on cpu, meta; expected all of its weights"):
        SpeculativeDecoder(model, **OPTIONS)
