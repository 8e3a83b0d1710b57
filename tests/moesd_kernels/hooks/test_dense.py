"""``accelerate(dense=…)``: the same numbers, rows that do not depend on each other, reversible."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from support.oracle import assert_as_accurate
from support.tiny import SPARSE_FAMILIES, sparse_model
from torch import nn

from moesd_kernels import accelerate, available_backends, decelerate
from moesd_kernels.dense import ops
from moesd_kernels.hooks.dense import accelerate_dense
from moesd_kernels.hooks.shadow import unshadow

pytestmark = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason="the CPU kernels cannot run here"
)
PROMPT = torch.arange(24).view(2, 12) % 50


def replaced(model):
    return {n: type(m).__name__ for n, m in model.named_modules() if "forward" in vars(m)}


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
@torch.no_grad()
def test_every_kind_of_module_is_replaced(family):
    model = accelerate(sparse_model(family))
    kinds = set(replaced(model).values())
    assert "Linear" in kinds
    assert any(kind.endswith("RMSNorm") for kind in kinds)
    routers = [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]
    assert routers and all("forward" in vars(m) for m in routers)


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
@torch.no_grad()
def test_fp32_logits_within_the_oracle_bound(family):
    model = sparse_model(family)
    model.set_experts_implementation("eager")
    exact = copy.deepcopy(model).double()(PROMPT).logits
    baseline = model(PROMPT).logits
    assert_as_accurate(accelerate(model)(PROMPT).logits, baseline, exact.double(), name=family)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "norm", "router"])
@torch.no_grad()
def test_modules_within_the_oracle_bound(kind, dtype):
    layer = sparse_model("qwen3_moe").model.layers[0]
    module = {
        "linear": nn.Linear(32, 20),
        "norm": layer.input_layernorm,
        "router": layer.mlp.gate,
    }[kind].to(dtype)
    x = torch.randn(3, 5, 32).to(dtype)
    first = lambda out: out[0] if isinstance(out, tuple) else out
    exact = first(copy.deepcopy(module).double()(x.double()))
    baseline = first(module(x))
    assert accelerate_dense(module) == 1
    actual = first(module(x))
    assert_as_accurate(actual.flatten(0, -2), baseline.flatten(0, -2), exact.flatten(0, -2))


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
@torch.no_grad()
def test_router_returns_what_the_class_returns(family):
    model = sparse_model(family, torch.bfloat16)
    router = next(m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter"))
    x = torch.randn(40, 32).bfloat16()
    expected = router(x)
    accelerate_dense(router)
    actual = router(x)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    same = actual[2].sort(-1).values == expected[2].sort(-1).values
    assert same.float().mean() > 0.95  # bf16 logits that tie may fall either way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", SPARSE_FAMILIES)
@torch.no_grad()
def test_block_rows_do_not_depend_on_the_others(family, dtype):
    """Bit for bit over a whole MoE block: router, experts, shared expert."""
    model = accelerate(sparse_model(family, dtype))
    block = next(m for m in model.modules() if hasattr(m, "experts"))
    x = torch.randn(1, 33, 32).to(dtype)
    run = lambda rows: (lambda out: out[0] if isinstance(out, tuple) else out)(block(rows))
    everything = run(x)
    for T in (1, 2, 5, 16):
        assert torch.equal(run(x[:, :T]), everything[:, :T]), T
    order = torch.randperm(33)
    assert torch.equal(run(x[:, order]), everything[:, order])


@torch.no_grad()
def test_decelerate_restores_everything():
    model = sparse_model("qwen3_moe")
    model.set_experts_implementation("grouped_mm")
    before = model(PROMPT).logits
    names = list(model.state_dict())
    accelerate(model)
    assert replaced(model) and list(model.state_dict()) == names
    decelerate(model)
    assert not replaced(model)
    assert torch.equal(model(PROMPT).logits, before)


@torch.no_grad()
def test_a_copy_uses_its_own_parameters():
    linear = nn.Linear(8, 4)
    accelerate_dense(linear)
    twin = copy.deepcopy(linear)
    twin.weight.zero_()
    twin.bias.zero_()
    assert (twin(torch.randn(2, 8)) == 0).all()
    assert not (linear(torch.randn(2, 8)) == 0).all()


class GatedMLP(nn.Module):
    def __init__(self, act_fn, swapped=False):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 20), nn.Linear(32, 20)
        self.down_proj, self.act_fn, self.swapped = nn.Linear(20, 32), act_fn, swapped

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        gate, up = (up, gate) if self.swapped else (gate, up)
        return self.down_proj(self.act_fn(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act_fn", [nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh")], ids=str)
@torch.no_grad()
def test_gated_mlp(act_fn, dtype):
    mlp = GatedMLP(act_fn).to(dtype)
    x = torch.randn(70, 32).to(dtype)
    exact, baseline = copy.deepcopy(mlp).double()(x.double()), mlp(x)
    accelerate_dense(mlp)
    assert replaced(mlp)[""] == "GatedMLP"
    whole = mlp(x)
    assert_as_accurate(whole, baseline, exact)
    for T in (1, 3, 16):
        assert torch.equal(mlp(x[:T]), whole[:T])


def test_an_mlp_that_computes_something_else_keeps_its_forward():
    mlp = GatedMLP(nn.SiLU(), swapped=True)
    accelerate_dense(mlp)
    assert "" not in replaced(mlp)


class ClampedMLP(GatedMLP):
    def __init__(self, limit):
        super().__init__(nn.SiLU())
        self.limit = limit

    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=self.limit), self.up_proj(x)
        return self.down_proj(self.act_fn(gate) * up.clamp(-self.limit, self.limit))


@pytest.mark.parametrize("limit", [7.0, 16.0, 100.0, 4000.0, 60000.0])
def test_a_clamp_that_ordinary_numbers_do_not_reach_is_seen(limit):
    mlp = ClampedMLP(limit)
    accelerate_dense(mlp)
    assert "" not in replaced(mlp)


def test_a_trained_gate_before_frozen_weights_gets_gradients():
    mlp = GatedMLP(nn.SiLU()).requires_grad_(False)
    mlp.gate_proj.requires_grad_(True)
    accelerate_dense(mlp)
    mlp(torch.randn(3, 32)).sum().backward()
    assert mlp.gate_proj.weight.grad is not None


class GemmaLikeRMSNorm(nn.Module):
    """Multiplies by 1 + w, which our kernel does not."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(8)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def test_a_norm_that_computes_something_else_is_left_alone():
    assert accelerate_dense(GemmaLikeRMSNorm()) == 0


def test_somebody_elses_forward_is_left_alone():
    linear = nn.Linear(8, 4)
    linear.forward = lambda x: x
    assert accelerate_dense(linear) == 0
    unshadow(linear)
    assert linear(3) == 3


def test_accelerating_twice_changes_nothing():
    model = accelerate(sparse_model("olmoe"))
    assert accelerate_dense(model) == 0


def steps_aside(x=None, weight_grad=False, **contexts):
    """Whether a replaced linear layer runs its class's forward in this situation."""
    linear = nn.Linear(8, 4).requires_grad_(weight_grad)
    accelerate_dense(linear)
    x = torch.randn(2, 8) if x is None else x
    with mock.patch.object(nn.Linear, "forward", return_value="own") as own:
        linear(x)
    return own.called


def test_steps_aside():
    assert not steps_aside()
    assert steps_aside(weight_grad=True)
    assert steps_aside(torch.randn(2, 8, requires_grad=True))
    assert steps_aside(torch.randn(2, 8, dtype=torch.float64))
    assert steps_aside(torch.randn(0, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert steps_aside()
    with torch.no_grad():
        assert not steps_aside(weight_grad=True)


def test_training_still_works():
    model = accelerate(sparse_model("qwen3_moe"))
    model(PROMPT, labels=PROMPT).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def more_than_one_input(kind):
    """A subclass that takes a factor, and multiplies by it."""

    def forward(self, hidden_states, factor=1.0):
        out = super(made, self).forward(hidden_states)
        return (*out[:1], factor * out[1], *out[2:]) if type(out) is tuple else factor * out

    made = type(kind.__name__, (kind,), {"forward": forward})
    return made


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2_moe", "mlp.gate"),
        ("glm4_moe", "mlp.gate"),
        ("glm4_moe", "mlp.shared_experts"),
        ("glm4_moe", "input_layernorm"),
    ],
)
@torch.no_grad()
def test_a_call_with_more_is_the_class_s_own(family, name):
    module = sparse_model(family).model.layers[-1].get_submodule(name)
    module.__class__ = more_than_one_input(type(module))
    x = torch.randn(3, 32)
    calls = [
        lambda: module(x, 2.0),
        lambda: module(x, factor=2.0),
        lambda: module(hidden_states=x),
    ]
    expected = [call() for call in calls]
    accelerate_dense(module)
    assert "" in replaced(module)
    for call, own in zip(calls, expected, strict=True):
        torch.testing.assert_close(call(), own, rtol=1e-4, atol=1e-4)


def test_unavailable_kernels(monkeypatch):
    monkeypatch.setattr(ops, "unavailable", lambda: "no C++ compiler found")
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler found"):
        accelerate(sparse_model("olmoe"), dense=True)
    model = accelerate(sparse_model("olmoe"), dense="auto")
    assert not replaced(model)
