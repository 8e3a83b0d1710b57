"""Our experts in vLLM's place, on a stand-in for vLLM: which layers, what they compute, the log."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from support.vllm import fake

import moesd_vllm
from moesd_kernels import fused_experts
from moesd_vllm import settings

E, H, I, T = 4, 16, 8, 3


@pytest.fixture
def vllm(monkeypatch, caplog):
    monkeypatch.delenv("MOESD_VLLM", raising=False)
    caplog.set_level(logging.INFO, "vllm.moesd")
    settings._is_experts.cache_clear()
    return fake.fake_vllm(monkeypatch)


def layer(activation: str = "silu", dtype: torch.dtype = torch.float32, **more) -> SimpleNamespace:
    """As much of a ``FusedMoEConfig`` as is read."""
    fields = dict.fromkeys(("swiglu_limit", "swiglu_alpha", "swiglu_beta"))
    fields["is_lora_enabled"] = False
    kind = SimpleNamespace(value=activation)
    return SimpleNamespace(activation=kind, in_dtype=dtype, **{**fields, **more})


def chosen(vllm, moe_config) -> type:
    """What the layer gets, as vLLM's ``UnquantizedFusedMoEMethod`` asks for it."""
    backend, experts = vllm.method.select_unquantized_moe_backend(moe_config=moe_config)
    assert backend == "backend"  # vLLM's own word for it stays
    return experts


def test_vllms_cpu_experts_become_ours_and_one_line_says_so(vllm, caplog) -> None:
    moesd_vllm.register()
    moesd_vllm.register()  # as vLLM may: once per process is enough
    for vllm.chosen in (fake.CPUUnquantizedExperts, fake.CPUUnquantizedExperts):
        ours = chosen(vllm, layer())
        assert ours.__name__ == "MoesdCpuExperts" and issubclass(ours, vllm.chosen)
    assert len(caplog.messages) == 1
    assert "unquantised silu experts in float32 run on moesd_kernels (cpu)" in caplog.text
    vllm.chosen = fake.X86CPUUnquantizedExperts
    assert chosen(vllm, layer(dtype=torch.bfloat16)).__name__ == "MoesdCpuExperts"
    assert "in bfloat16 run on moesd_kernels (cpu) instead of X86CPU" in caplog.messages[1]


@pytest.mark.parametrize(
    ("theirs", "moe_config", "reason"),
    [
        ("CPUUnquantizedExperts", layer("situ"), "the activation situ is none of ours"),
        ("CPUUnquantizedExperts", layer(dtype=torch.float64), "backend 'cpu' cannot run this call"),
        ("CPUUnquantizedExperts", layer(is_lora_enabled=True), "LoRA is on"),
        ("FlashInferExperts", layer(), "nothing of ours stands in for these"),
    ],
)
def test_what_is_not_taken_over_stays_as_vllm_chose_it(
    vllm, caplog, theirs, moe_config, reason
) -> None:
    moesd_vllm.register()
    vllm.chosen = getattr(fake, theirs)
    assert chosen(vllm, moe_config) is vllm.chosen
    assert chosen(vllm, moe_config) is vllm.chosen
    assert len(caplog.messages) == 1
    assert f"stay on vLLM's {theirs}: {reason}" in caplog.text


def test_a_back_end_that_is_missing_is_the_reason(vllm, caplog, monkeypatch) -> None:
    moesd_vllm.register()
    from moesd_vllm import experts

    def missing(name: str, traits) -> None:
        raise RuntimeError(f"backend {name!r} cannot run this call: no {traits.device} device")

    vllm.chosen = fake.TritonExperts
    monkeypatch.setattr(experts, "choose_backend", missing)
    assert chosen(vllm, layer()) is fake.TritonExperts
    assert "stay on vLLM's TritonExperts: backend 'triton' cannot run this call: no cuda" in (
        caplog.text
    )
    there = SimpleNamespace(load=lambda: None)
    monkeypatch.setattr(experts, "choose_backend", lambda name, traits: there)
    assert chosen(vllm, layer("gelu")).__name__ == "MoesdTritonExperts"
    assert "unquantised gelu experts in float32 run on moesd_kernels (triton)" in caplog.text


@pytest.mark.parametrize("map_of", [None, [-1, 0, 1, -1, 2, 3]], ids=["all here", "some elsewhere"])
@pytest.mark.parametrize("on_input", [False, True], ids=["weights after", "weights before"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_call_of_vllms_is_a_call_of_ours(vllm, map_of, on_input, bias) -> None:
    moesd_vllm.register()
    w13, w2, x = torch.randn(E, 2 * I, H), torch.randn(E, H, I), torch.randn(T, H)
    b13, b2 = (torch.randn(E, 2 * I), torch.randn(E, H)) if bias else (None, None)
    expert_map = None if map_of is None else torch.tensor(map_of, dtype=torch.int32)
    many, K = (E, 2) if map_of is None else (len(map_of), 2)
    if on_input:
        K = 1  # vLLM multiplies the input for one expert per token only
    ids, weights = torch.randint(many, (T, K), dtype=torch.int32), torch.rand(T, K)

    experts = chosen(vllm, layer())(layer(), SimpleNamespace(w1_bias=b13, w2_bias=b2))
    kept = SimpleNamespace(w13_weight=w13, w2_weight=w2)
    experts.process_weights_after_loading(kept)
    assert kept.w13_weight is w13 and kept.w2_weight is w2
    shapes = experts.workspace_shapes(T, 2 * I, H, K, many, E, None, None)
    assert shapes == ((0,), (0,), (T, H))
    assert experts.finalize_weight_and_reduce_impl() == "no-op"
    output = torch.full((T, H), torch.nan)
    experts.apply(
        output=output,
        hidden_states=x,
        w1=w13,
        w2=w2,
        topk_weights=weights,
        topk_ids=ids,
        activation=None,
        global_num_experts=many,
        expert_map=expert_map,
        a1q_scale=None,
        a2_scale=None,
        workspace13=torch.empty(0),
        workspace2=torch.empty(0),
        expert_tokens_meta=None,
        apply_router_weight_on_input=on_input,
    )
    here = ids if map_of is None else expert_map[ids.long()]
    expected = fused_experts(
        x,
        w13,
        w2,
        here,
        torch.ones_like(weights) if on_input else weights,
        gate_up_bias=b13,
        down_bias=b2,
        backend="reference",
    )
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("variable", "additional", "ours", "said"),
    [
        ("experts", {}, True, None),
        ("", {"moesd": "experts"}, True, None),
        ("off", {}, False, None),
        ("off", {"moesd": "experts"}, False, None),
        ("experts", {"moesd": "off"}, False, None),
        ("expert", {}, False, "MOESD_VLLM to be 'experts' or 'off', got expert"),
        ("experts", {"moesd": ["off"]}, False, "got ['off']"),
        ("experts", {"moesd": True}, False, "['moesd'] to be 'experts' or 'off', got True"),
        ("experts", "an object of vLLM's", True, None),
    ],
)
def test_who_says_off_gets_vllms_own(
    vllm, caplog, monkeypatch, variable, additional, ours, said
) -> None:
    monkeypatch.setenv("MOESD_VLLM", variable)
    vllm.config = SimpleNamespace(additional_config=additional)
    moesd_vllm.register()
    assert (chosen(vllm, layer()) is not vllm.chosen) == ours
    assert said is None or said in caplog.text


def test_another_version_is_left_alone(monkeypatch, caplog) -> None:
    state = fake.fake_vllm(monkeypatch, "0.33.1+cpu")
    untouched = state.method.select_unquantized_moe_backend
    moesd_vllm.register()
    assert state.method.select_unquantized_moe_backend is untouched
    assert caplog.messages == [
        "moesd: expected vLLM 0.32.x, found 0.33.1+cpu: its experts stay its own"
    ]
