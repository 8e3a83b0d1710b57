"""Which MLPs the C++ layer stack runs itself, and what it refuses.

That what it runs is bit-identical to the modules is tested with the decoder's lean forward.
"""

import pytest
import torch
import transformers

import moesd_kernels
from moesd_kernels.dense import ops

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def mlp_of(family, accelerate=True, **changes):
    config = getattr(transformers, f"{family}Config")(**SHAPE | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if accelerate:
        moesd_kernels.accelerate(model)
    return model.model.layers[0].mlp


def stack_of_one():
    from moesd_kernels.hooks.walk.cpu_stack import layer_stack

    stack, ones = layer_stack(), torch.ones(32)
    joined, out = torch.randn(64, 32), torch.randn(32, 32)
    stack.add_layer(joined, None, None, None, out, None, ones, ones, [1e-6] * 4, 0.25, 0, 2, 1)
    return stack


@pytest.mark.parametrize(
    ("family", "changes", "known"),
    [
        ("Llama", {}, True),
        ("Llama", {"mlp_bias": True}, True),
        ("Llama", {"hidden_act": "gelu"}, False),  # GELUActivation: not one of the fused ones
        ("Qwen3Moe", EXPERTS, True),
        ("Mixtral", {"num_local_experts": 4}, True),
        ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 32}, False),
        ("GptOss", {"num_local_experts": 4}, False),  # router and experts of another kind
    ],
)
def test_known_mlps(family, changes, known):
    from moesd_kernels.hooks.walk.cpu_stack import set_mlp

    assert set_mlp(stack_of_one(), mlp_of(family, **changes)) == known


@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe"])
def test_modules_that_do_not_run_our_kernels_are_left_alone(family):
    from moesd_kernels.hooks.walk.cpu_stack import set_mlp

    assert not set_mlp(stack_of_one(), mlp_of(family, accelerate=False))


def run(stack, **changes):
    T = 3
    arguments = {
        "x": torch.randn(T, 32), "states": torch.randn(T, 32), "cos": torch.ones(T, 16),
        "sin": torch.zeros(T, 16), "index": torch.arange(T), "positions": torch.arange(T)[None],
        "rows": torch.zeros(1, dtype=torch.long), "keys": [torch.zeros(1, 8, 1, 16)],
        "values": [torch.zeros(1, 8, 1, 16)], "first": 0, "stop": 1, "mlps": True, "columns": None,
    }  # fmt: skip
    return stack.run(*(arguments | changes).values())


def test_a_layer_without_an_mlp_stops_after_its_attention():
    _, states, reached = run(stack_of_one())
    assert reached == 0 and states.shape == (3, 32)


@pytest.mark.parametrize("columns", [[[2]], [[0, 2, 1]], [[]]])
def test_the_last_layer_computes_the_columns_that_are_wanted(columns):
    torch.manual_seed(0)
    stack, columns = stack_of_one(), torch.tensor(columns, dtype=torch.long)
    x, states = torch.randn(2, 3, 32)
    everything = run(stack, x=x, states=states)
    wanted = run(stack, x=x, states=states, columns=columns)
    for some, all_of_them in zip(wanted[:2], everything[:2], strict=True):
        assert torch.equal(some, all_of_them[columns[0]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop": 2}, "0 <= first <= stop <= 1, got 0 and 2"),
        ({"first": -1}, "got -1 and 1"),
        ({"keys": []}, "expected 1 slabs of keys and of values, got 0 and 1"),
        ({"positions": torch.arange(3)}, r"positions must be \[B, Q\], got \[3\]"),
        ({"index": torch.tensor([0, 1, 8])}, r"index must be in \[0, 8\), got 8"),
        ({"columns": torch.tensor([[3]])}, r"columns must be in \[0, 3\), got 3"),
        ({"columns": torch.tensor([[-1]])}, r"columns must be in \[0, 3\), got -1"),
        ({"columns": torch.tensor([0])}, r"columns must be \[1, n\], got \[1\]"),
    ],
)
def test_errors(changes, message):
    with pytest.raises((ValueError, IndexError, RuntimeError), match=message):
        run(stack_of_one(), **changes)


def test_an_mlp_needs_a_layer():
    from moesd_kernels.hooks.walk.cpu_stack import layer_stack, set_mlp

    with pytest.raises((ValueError, RuntimeError), match="a layer to have been added"):
        set_mlp(layer_stack(), mlp_of("Llama"))


def test_a_position_beyond_a_row_is_refused_before_another_row_is_written():
    keys, values = torch.zeros(2, 2, 8, 1, 16)
    table, weights = torch.ones(16, 16), torch.ones(64, 32)
    places = torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), 8), torch.zeros(1).long()
    with pytest.raises(IndexError, match="positions must be below 8, got 8"):
        stack_of_one().continue_greedily(
            *places, weights, weights[0], 1e-6, weights, table, table, [keys], [values], 1
        )
    nothing = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0).long(), torch.zeros(1).long()
    with pytest.raises(ValueError, match=r"ids and positions \[B, W > 0\].*got \[1, 0\]"):
        stack_of_one().continue_greedily(
            *nothing, weights, weights[0], 1e-6, weights, table, table, [keys], [values], 1
        )
    assert not keys.any() and not values.any()
