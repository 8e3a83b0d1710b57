"""What runs, as a decoder's settings ask for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support.tiny import greedy_reference, tiny_model

from decoder import SamplingParams, SpeculativeDecoder
from decoder.errors import UserError
from decoder.model import kernels, support

OPTIONS = {"gamma": 2, "max_batch_size": 2, "max_length": 40}


def test_rows_that_do_not_depend_on_the_batch_are_asked_for(caplog, monkeypatch):
    """Where a GPU would run some of the model's linear layers as modules, one line says so."""
    model = tiny_model("qwen3_moe")
    SpeculativeDecoder(model, **OPTIONS)
    assert not kernels.is_batch_invariant(model)
    SpeculativeDecoder(model, **OPTIONS, batch_invariant=True)
    assert kernels.is_batch_invariant(model)
    SpeculativeDecoder(model, **OPTIONS)
    assert kernels.is_batch_invariant(model), "an owner's choice stays"
    monkeypatch.setattr(
        support, "kernels", SimpleNamespace(**(vars(kernels) | {"on_gpu": lambda _: True}))
    )
    SpeculativeDecoder(model, **OPTIONS)
    assert "batch_invariant: not the linear layers of" not in caplog.text, "all are ours"
    SpeculativeDecoder(tiny_model("gpt_oss"), **OPTIONS, batch_invariant=True)
    assert "batch_invariant: not the linear layers of GptOssForCausalLM" in caplog.text
    with pytest.raises(UserError, match="batch_invariant is of moesd's own kernels"):
        SpeculativeDecoder(model, **OPTIONS, kernels=False, batch_invariant=True)


@pytest.mark.parametrize("length", [2, 3, 4])
@pytest.mark.parametrize("attention", ["auto", "portable"])
def test_rows_may_be_shorter_than_the_trial(attention, length):
    model = tiny_model("llama")
    engine = SpeculativeDecoder(model, None, 0, max_length=length, attention=attention)
    expected = greedy_reference(model, [5], length - 1, eos=False)
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    assert engine.generate([[5]], params)[0].token_ids == expected
