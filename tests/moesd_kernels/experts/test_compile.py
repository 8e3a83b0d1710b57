"""``torch.compile(fullgraph=True)`` with a changing number of tokens, and the op's contract."""

from __future__ import annotations

import pytest
import torch
from support.oracle import make_case
from support.tiny import sparse_model

from moesd_kernels import ExpertsSpec, MoE, MoEConfig, RouterRule, accelerate, fused_experts


@torch.no_grad()
def test_layer_compiles_once_for_any_number_of_tokens():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(fused_experts, fullgraph=True, dynamic=True, backend=count)
    for T in (5, 3, 17, 64):  # the first is none of K, E, H, I, which would tie the sizes
        case = make_case(T, 2, 4, 32, 16)
        assert torch.equal(compiled(*case.tensors), fused_experts(*case.tensors))
    assert len(graphs) == 1


@torch.no_grad()
def test_layer_compiles_with_inductor():
    def layer(*tensors):
        return fused_experts(*tensors).relu()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for T in (2, 9):
        case = make_case(T, 2, 4, 32, 16)
        torch.testing.assert_close(compiled(*case.tensors), layer(*case.tensors))


@torch.no_grad()
def test_block_compiles_without_graph_breaks():
    """Through transformers' dispatch and our hook; the whole model only adds tracing time."""
    block = accelerate(sparse_model("qwen3_moe"), dense=False).model.layers[0].mlp
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="eager")
    for T in (11, 5):
        x = torch.randn(3, T, 32)
        assert torch.equal(compiled(x), block(x))


@pytest.mark.parametrize("form", ["options", "spec"])
@torch.no_grad()
def test_options_compile(form):
    """A spec is made outside the graph; options are handed to the op, which makes one of them."""
    options = {"interleaved": True, "activation": "gelu_new", "activation_limit": 0.5}
    given = options if form == "options" else {"spec": ExpertsSpec(**options)}

    def layer(*tensors):
        return fused_experts(*tensors, **given)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for T in (5, 9):
        case = make_case(T, 2, 4, 32, 16, interleaved=True)
        assert torch.equal(compiled(*case.tensors), layer(*case.tensors))


@torch.no_grad()
def test_compiled_with_an_unknown_option_says_so():
    compiled = torch.compile(fused_experts, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="activation_function"):
        compiled(*make_case(3, 2, 4, 32, 16).tensors, activation_function="gelu")


@torch.no_grad()
def test_module_compiles():
    moe = MoE(MoEConfig(4, 32, 16, RouterRule("softmax", 2), ExpertsSpec("gelu")))
    compiled, x = torch.compile(moe, fullgraph=True, backend="eager"), torch.randn(3, 32)
    assert torch.equal(compiled(x), moe(x))


def test_compiled_with_gradients_says_so():
    case = make_case(3, 2, 4, 32, 16)
    case.tensors[0].requires_grad_()
    compiled = torch.compile(fused_experts, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="no backward pass"):
        compiled(*case.tensors)


def test_op_contract():
    """Schema, fake implementation and tracing agree with the real op."""
    x, w_gate_up, w_down, ids, weights = make_case(3, 2, 4, 32, 16).tensors
    flags = ("silu", True, False, False, None, None, "plain", None, False, "auto", False)
    torch.library.opcheck(
        torch.ops.moesd.fused_experts,
        (x, w_gate_up, w_down, ids, weights, *[None] * 4, *flags),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
