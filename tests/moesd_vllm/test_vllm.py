"""The plugin in vLLM itself: ``make test-vllm`` runs these in an environment of their own."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.oracle import assert_as_accurate
from torch import Tensor

import decoder.embedded
from moesd_kernels import fused_experts
from moesd_vllm.mapping import experts_spec

pytestmark = pytest.mark.vllm

ASSETS = Path(decoder.embedded.__file__).parent / "assets"
CHILD = Path(__file__).parents[1] / "support" / "vllm" / "engine_child.py"
PROMPTS = [list(range(40 + 3 * row, 56 + 3 * row)) for row in range(4)]
TAKEN_OVER = "moesd: unquantised silu experts in bfloat16 run on moesd_kernels (cpu) instead of"
GAMMA = "moesd_vllm.gamma_scheduler"
E, K, H, I, T = 8, 2, 128, 64, 9


@functools.cache
def run(engine: str = "{}", **environment: str) -> SimpleNamespace:
    """A run of the engine with more arguments, as JSON: its tokens and lengths, and its log."""
    arguments = {"model": str(ASSETS / "target"), "enforce_eager": True, **json.loads(engine)}
    task = {"engine": arguments, "prompts": PROMPTS, "max_tokens": 96}
    done = subprocess.run(
        [sys.executable, str(CHILD), json.dumps(task)],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    answer = next(line for line in done.stdout.splitlines() if line.startswith('{"tokens"'))
    return SimpleNamespace(**json.loads(answer), log=done.stdout + done.stderr)


def speculative(**config: Any) -> SimpleNamespace:
    """A run with the engine in the child itself, with drafts and our choice of their number."""
    engine = {"speculative_config": config, "scheduler_cls": GAMMA}
    return run(json.dumps(engine), VLLM_ENABLE_V1_MULTIPROCESSING="0")


def test_greedy_tokens_are_vllms_own_and_the_log_says_who_computed_them() -> None:
    ours, own = run(), run(MOESD_VLLM="off")
    assert ours.log.count(TAKEN_OVER) == 1 and "MoesdCpuExperts" in ours.log
    assert "moesd:" not in own.log and "MoesdCpuExperts" not in own.log
    assert ours.tokens == own.tokens


def test_additional_config_says_off_too() -> None:
    own = run('{"additional_config": {"moesd": "off"}}')
    assert "moesd:" not in own.log
    assert own.tokens == run(MOESD_VLLM="off").tokens


def test_experts_are_spread_over_ranks() -> None:
    """vLLM's own unquantised experts on a CPU take ids of all ranks for their own, and crash."""
    spread = run('{"tensor_parallel_size": 2, "enable_expert_parallel": true}')
    assert spread.log.count(TAKEN_OVER) == 2 and "Worker_TP1_EP1" in spread.log
    assert spread.tokens == run().tokens


def test_a_compiled_model_has_our_experts_as_one_operation() -> None:
    compiled = '{"enforce_eager": false}'
    # Traced by Dynamo, run eagerly: minutes of Inductor would show no more of ours.
    ours = run(compiled, VLLM_CPU_CI_ENV="1")
    own = run(compiled, VLLM_CPU_CI_ENV="1", MOESD_VLLM="off")
    assert TAKEN_OVER in ours.log and "moesd:" not in own.log
    assert ours.tokens == own.tokens


@pytest.mark.parametrize(
    "config",
    [
        {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3},
        {"method": "draft_model", "model": str(ASSETS / "draft")},
    ],
    ids=lambda config: config["method"],
)
def test_the_draft_length_changes_and_the_tokens_do_not(config) -> None:
    drafting = speculative(**config, num_speculative_tokens=4)
    assert f"moesd: of 0, 1, 2, 3, 4 tokens drafted by {config['method']}" in drafting.log
    assert 0 in drafting.lengths and len(set(drafting.lengths)) > 2
    assert drafting.tokens == run().tokens


def test_a_table_says_which_lengths_there_are() -> None:
    table = [(1, 1, 0), (2, 8, 3)]
    drafting = speculative(
        method="draft_model",
        model=str(ASSETS / "draft"),
        num_speculative_tokens=3,
        num_speculative_tokens_per_batch_size=table,
    )
    assert "moesd: of 0, 3 tokens drafted by draft_model" in drafting.log
    assert set(drafting.lengths) == {0, 3}
    assert drafting.tokens == run().tokens


def moe_config(activation: str, bias: bool) -> Any:
    """vLLM's description of the layer below."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    return FusedMoEConfig(
        num_experts=E,
        experts_per_token=K,
        hidden_dim=H,
        intermediate_size=I,
        num_local_experts=E,
        num_logical_experts=E,
        activation=MoEActivation(activation),
        device="cpu",
        routing_method=RoutingMethodType.Default,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
        has_bias=bias,
    )


def applied(experts: Any, layer: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What a class of experts writes, called as vLLM calls it."""
    output = torch.full((T, H), torch.nan, dtype=torch.bfloat16)
    experts.apply(
        output=output,
        hidden_states=x,
        w1=layer.w13_weight,
        w2=layer.w2_weight,
        topk_weights=weights,
        topk_ids=ids,
        activation=experts.moe_config.activation,
        global_num_experts=E,
        expert_map=None,
        a1q_scale=None,
        a2_scale=None,
        workspace13=torch.empty(0),
        workspace2=torch.empty(0),
        expert_tokens_meta=None,
        apply_router_weight_on_input=False,
    )
    return output


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swigluoai"])
def test_a_layer_of_ours_is_as_accurate_as_vllms(activation, bias) -> None:
    """Both on one module with the weights as vLLM loads them, which vLLM's then repack."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEQuantConfig,
        biased_moe_quant_config,
    )
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    from moesd_vllm.experts import MoesdCpuExperts

    tensors = {
        "w13_weight": torch.randn(E, 2 * I, H) / H**0.5,
        "w2_weight": torch.randn(E, H, I) / I**0.5,
        "w13_bias": torch.randn(E, 2 * I),
        "w2_bias": torch.randn(E, H),
    }
    layer = torch.nn.Module()
    for name, tensor in tensors.items():
        parameter = torch.nn.Parameter(tensor.bfloat16(), requires_grad=False)
        layer.register_parameter(name, parameter)
    x, weights = torch.randn(T, H).bfloat16(), torch.rand(T, K)
    ids = torch.rand(T, E).topk(K).indices.int()
    exact = fused_experts(
        x.double(),
        layer.w13_weight.double(),
        layer.w2_weight.double(),
        ids,
        weights,
        gate_up_bias=layer.w13_bias.double() if bias else None,
        down_bias=layer.w2_bias.double() if bias else None,
        spec=experts_spec(activation),
        backend="reference",
    )
    outputs = []
    with set_current_vllm_config(VllmConfig()):
        quant = FusedMoEQuantConfig.make()
        if bias:
            quant = biased_moe_quant_config(layer.w13_bias, layer.w2_bias)
        for kind in (MoesdCpuExperts, CPUUnquantizedExperts):  # vLLM's last: they repack
            experts = kind(moe_config(activation, bias), quant)
            experts.process_weights_after_loading(layer)
            outputs.append(applied(experts, layer, x, ids, weights))
    ours, theirs = outputs
    # What theirs compute is what we say it is; then ours are held to how well they do.
    assert (theirs.double() - exact).norm() < 0.02 * exact.norm()
    assert_as_accurate(ours, theirs, exact)
