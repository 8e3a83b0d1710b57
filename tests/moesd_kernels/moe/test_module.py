"""The ``MoE`` module against the transformers blocks it stands in for, and its loader."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from support.oracle import assert_as_accurate
from support.tiny import SPARSE_FAMILIES, sparse_model

from moesd_kernels import ExpertsSpec, MoE, MoEConfig, RouterRule


def block_of(family):
    """(prefix in the checkpoint, block) of the first layer."""
    model = sparse_model(family)
    name = next(n for n, m in model.named_modules() if hasattr(m, "experts"))
    return model, name + ".", model.get_submodule(name)


def run_block(block, x):
    block.experts.config._experts_implementation = "eager"
    out = block(x)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", SPARSE_FAMILIES)
@torch.no_grad()
def test_equals_the_transformers_block(family, dtype):
    _, _, block = block_of(family)
    # bf16 inputs to both sides, so that fp64 and bf16 logits choose the same experts.
    block = block.bfloat16().to(dtype)
    x = torch.randn(3, 7, 32).bfloat16().to(dtype)
    exact = run_block(copy.deepcopy(block).double(), x.double())
    actual = MoE.from_transformers(block)(x)
    assert_as_accurate(actual, run_block(block, x), exact.double(), name=family)


def test_a_shared_expert_that_clamps_is_refused():
    _, _, block = block_of("glm4_moe")
    shared = block.shared_experts
    own = type(shared).forward
    clamped = {"forward": lambda self, x: own(self, x).clamp(-20, 20)}
    shared.__class__ = type("ClampedMLP", (type(shared),), clamped)
    with pytest.raises(ValueError, match="computes of its parts is not what MoE does"):
        MoE.from_transformers(block)


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_shares_the_block_parameters(family):
    _, _, block = block_of(family)
    moe = MoE.from_transformers(block)
    theirs = {p.data_ptr() for p in block.parameters()}
    assert {p.data_ptr() for p in moe.parameters()} == theirs


def test_relates_to_the_checkpoint_of_the_model(tmp_path):
    """Fused names, a prefix, and a checkpoint split over files with an index."""
    model, prefix, block = block_of("qwen2_moe")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected = MoE.from_transformers(block)
    loaded = MoE.from_safetensors(tmp_path, expected.config, prefix=prefix)
    x = torch.randn(5, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), expected(x))


@pytest.mark.parametrize("style", ["mixtral", "per-expert", "fused"])
def test_checkpoint_names(style, tmp_path):
    config = MoEConfig(3, 8, 4, RouterRule("softmax", 2))
    source = MoE(config)
    state = source.state_dict()
    tensors = {"gate.weight": state["gate.weight"]}
    if style == "fused":
        tensors = dict(state)
    else:
        names = ("w1", "w3", "w2") if style == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        for e in range(3):
            gate, up = state["experts.gate_up_proj"][e].chunk(2)
            for name, tensor in zip(names, (gate, up, state["experts.down_proj"][e]), strict=True):
                tensors[f"experts.{e}.{name}.weight"] = tensor
    head = "block_sparse_moe." if style == "mixtral" else "mlp."
    file = tmp_path / "model.safetensors"
    save_file({f"layers.0.{head}{n}": t.contiguous().clone() for n, t in tensors.items()}, file)
    prefix = "layers.0." if style == "mixtral" else "layers.0.mlp."
    for path in (file, tmp_path):
        loaded = MoE.from_safetensors(path, config, prefix=prefix)
        for name, tensor in state.items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (
        MoE.from_safetensors(file, config, prefix=prefix, dtype=torch.bfloat16)(
            torch.randn(2, 8).bfloat16()
        ).dtype
        == torch.bfloat16
    )


def test_checkpoint_errors(tmp_path):
    config = MoEConfig(3, 8, 4, RouterRule("softmax", 2))
    with pytest.raises(FileNotFoundError, match="no safetensors file"):
        MoE.from_safetensors(tmp_path, config)
    save_file({"gate.weight": torch.zeros(3, 8)}, tmp_path / "a.safetensors")
    with pytest.raises(KeyError, match=r"has no experts\.\*, got \['gate.weight'\]"):
        MoE.from_safetensors(tmp_path, config)
    experts = {"experts.gate_up_proj": torch.zeros(3, 8, 8)}
    save_file({"gate.weight": torch.zeros(3, 8), **experts}, tmp_path / "a.safetensors")
    with pytest.raises(KeyError, match=r"has no experts\.down_proj"):
        MoE.from_safetensors(tmp_path, config)
    save_file({"gate.weight": torch.zeros(4, 8), **experts}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"gate\.weight must be \(3, 8\), got \(4, 8\)"):
        MoE.from_safetensors(tmp_path, config)


def test_trains():
    """With gradients the layer takes a differentiable path by itself."""
    moe = MoE(MoEConfig(4, 8, 6, RouterRule("softmax", 2), shared_intermediate_size=5))
    moe(torch.randn(9, 8)).square().mean().backward()
    assert all(p.grad is not None for p in moe.parameters())


def test_group_limited_choice_stays_in_the_best_groups():
    rule = RouterRule("sigmoid", 2, num_groups=3, topk_groups=1)
    logits = torch.tensor([[5.0, -9, 3, 3, 4, -9]])  # top-2 sums: group 1 wins, expert 0 is best
    assert sorted(rule.select(logits).ids[0].tolist()) == [2, 3]


def test_correction_changes_the_choice_and_not_the_weight():
    rule = RouterRule("sigmoid", 1)
    routed = rule.select(torch.tensor([[1.0, 0.0]]), torch.tensor([0.0, 9.0]))
    assert routed.ids.item() == 1
    assert routed.weights.item() == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["softmax", "topk_softmax", "sigmoid"])
def test_scores_are_fp32_whatever_the_logits(kind):
    rule = RouterRule(kind, 2, renormalize=kind == "sigmoid")
    logits = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    low, wide = rule.select(logits), rule.select(logits.float())
    assert torch.equal(low.ids, wide.ids) and torch.equal(low.weights, wide.weights)


NO_GATE = ExpertsSpec(gated=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RouterRule("top", 2), "got 'top'"),
        (lambda: RouterRule("softmax", 0), "got 0"),
        (lambda: RouterRule("softmax", 1, precision="half"), "got 'half'"),
        (lambda: MoEConfig(2, 8, 4, RouterRule("softmax", 3)), r"in \[1, 2\], got 3"),
        (lambda: MoEConfig(2, 8, 4, RouterRule("softmax", 1), shared_gate=True), "got 0"),
        (lambda: MoEConfig(2, 8, 4, RouterRule("softmax", 1), NO_GATE), "be gated, got .*False"),
        (lambda: MoE.from_transformers(torch.nn.Linear(2, 2)), "got Linear"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_width():
    moe = MoE(MoEConfig(2, 8, 4, RouterRule("softmax", 1)))
    with pytest.raises(ValueError, match=r"must be \[\.\.\., 8\], got \(3, 7\)"):
        moe(torch.zeros(3, 7))
