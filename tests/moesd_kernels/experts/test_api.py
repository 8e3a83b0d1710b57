"""``fused_experts`` on every back-end that runs here: values, edge cases, errors, selection."""

from __future__ import annotations

import logging

import pytest
import torch
from support.oracle import check_experts, eager_experts, make_case

from moesd_kernels import available_backends, fused_experts
from moesd_kernels.experts import api
from moesd_kernels.experts.backends import BACKENDS, CallTraits, choose_backend

HERE = [name for name, reason in available_backends().items() if reason is None]
ON_CPU = [name for name in HERE if BACKENDS[name].devices in (None, frozenset({"cpu"}))]
INVARIANT = [name for name in ON_CPU if BACKENDS[name].invariant]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# (T, K, E, H, I), each with the reason it is here.
SHAPES = [
    pytest.param((1, 2, 4, 64, 32), id="one-token"),
    pytest.param((3, 1, 4, 64, 32), id="K1"),
    pytest.param((5, 4, 4, 64, 32), id="K-equals-E"),
    pytest.param((17, 2, 7, 40, 33), id="prime-E-odd-I"),
    pytest.param((3, 2, 64, 32, 16), id="most-experts-empty"),
    pytest.param((70, 4, 8, 72, 40), id="many-tokens-per-expert"),
    pytest.param((9, 2, 3, 1, 1), id="smallest-H-and-I"),
]
VARIANTS = {
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_pytorch_tanh"},
    "relu": {"activation": "relu"},
    "bias": {"bias": True},
    "not-gated": {"gated": False, "activation": "relu2", "bias": True},
    "interleaved": {"interleaved": True},
    "transposed": {"transposed": True},
    "limit": {"activation_limit": 0.5},
    "gpt-oss": {
        "bias": True,
        "interleaved": True,
        "transposed": True,
        "activation_limit": 7.0,
        "activation_alpha": 1.702,
    },
}


@pytest.fixture(params=ON_CPU)
def backend(request):
    return request.param


def run(case, backend, **more):
    out = torch.full_like(case.tensors[0], float("nan"), memory_format=torch.contiguous_format)
    result = fused_experts(*case.tensors, **case.options, backend=backend, out=out, **more)
    assert result is out
    return out


def test_calls_the_quick_way_does_not_serve_go_the_long_way():
    """After a plain call: gradients, strided weights, doubles; wrong arguments by their names."""
    case = make_case(4, 2, 3, 32, 16)
    x, w_gate_up, w_down, ids, weights = case.tensors
    check_experts(fused_experts(*case.tensors), case)
    wanted = fused_experts(x, w_gate_up.clone().requires_grad_(), w_down, ids, weights)
    assert wanted.requires_grad
    strided = w_gate_up.mT.contiguous().mT
    assert not strided.is_contiguous()
    check_experts(fused_experts(x, strided, w_down, ids, weights), case)
    double = fused_experts(x.double(), w_gate_up.double(), w_down.double(), ids, weights)
    assert double.dtype == torch.float64
    with pytest.raises(ValueError, match="topk_ids"):
        fused_experts(x, w_gate_up, w_down, ids[:2], weights)


def test_transforms_of_torch_func_differentiate_after_a_plain_call():
    x, *rest = make_case(4, 2, 3, 32, 16).tensors

    def total(x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        return fused_experts(x, *rest, backend=backend).square().sum()

    total(x)
    wanted = torch.func.grad(lambda x: total(x, "reference"))(x)
    torch.testing.assert_close(torch.func.grad(total)(x), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.vjp(total, x)[1](torch.tensor(1.0))[0], wanted)
    if "cpu" in HERE:
        total(x, "cpu")
        with pytest.raises(RuntimeError, match="no backward pass"):
            torch.func.grad(lambda x: total(x, "cpu"))(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_eager(backend, shape, dtype):
    case = make_case(*shape, dtype)
    check_experts(run(case, backend), case, backend)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(backend, variant, dtype):
    case = make_case(11, 2, 5, 48, 24, dtype, **VARIANTS[variant])
    check_experts(run(case, backend), case, backend)


def test_no_tokens(backend):
    case = make_case(0, 2, 4, 16, 8)
    assert run(case, backend).shape == (0, 16)


def test_ids_out_of_range_contribute_nothing(backend):
    x, w_gate_up, w_down, ids, weights = make_case(6, 3, 4, 32, 16).tensors
    ids[0], ids[1, 0], ids[2, 1], ids[3, 2] = -1, 4, -7, 10**6
    case = make_case(6, 3, 4, 32, 16)._replace(tensors=(x, w_gate_up, w_down, ids, weights))
    out = run(case, backend)
    check_experts(out, case, backend)
    assert (out[0] == 0).all()


def test_duplicates_in_a_row_count_twice(backend):
    case = make_case(4, 2, 3, 32, 16)
    ids = case.tensors[3]
    ids[:, 1] = ids[:, 0]
    check_experts(run(case, backend), case, backend)


def test_all_tokens_to_one_expert(backend):
    case = make_case(33, 1, 6, 32, 16, torch.bfloat16)
    case.tensors[3].fill_(5)
    check_experts(run(case, backend), case, backend)


@pytest.mark.parametrize("weights_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_routing_dtypes(backend, ids_dtype, weights_dtype):
    x, w_gate_up, w_down, ids, weights = make_case(5, 2, 4, 32, 16, torch.bfloat16).tensors
    tensors = (x, w_gate_up, w_down, ids.to(ids_dtype), weights.to(weights_dtype))
    case = make_case(5, 2, 4, 32, 16)._replace(tensors=tensors)
    check_experts(run(case, backend), case, backend)


def test_non_contiguous_activations_and_routing(backend):
    case = make_case(6, 2, 4, 32, 16)
    x, w_gate_up, w_down, ids, weights = case.tensors
    wide = torch.full((6, 64), float("nan"))
    wide[:, ::2] = x
    tensors = (wide[:, ::2], w_gate_up, w_down, ids.T.contiguous().T, weights.T.contiguous().T)
    case = case._replace(tensors=tensors)
    check_experts(run(case, backend), case, backend)


def test_biases_may_be_strided(backend):
    case = make_case(6, 2, 4, 32, 16, bias=True)
    given = {name: case.options[name] for name in ("gate_up_bias", "down_bias")}
    strided = {name: bias.T.contiguous().T for name, bias in given.items()}
    assert not any(bias.is_contiguous() for bias in strided.values())
    case = case._replace(options=case.options | strided)
    check_experts(run(case, backend), case, backend)
    check_experts(fused_experts(*case.tensors, **case.options, backend=backend), case, backend)


def test_out_may_be_strided(backend):
    case = make_case(6, 2, 4, 32, 16)
    out = torch.full((6, 64), float("nan"))
    fused_experts(*case.tensors, backend=backend, out=out[:, ::2])
    check_experts(out[:, ::2], case, backend)
    assert out[:, 1::2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INVARIANT)
def test_a_row_does_not_depend_on_the_others(name, dtype):
    """Bit for bit: alone, in any batch size, in any order."""
    case = make_case(40, 2, 4, 48, 24, dtype)
    x, w_gate_up, w_down, ids, weights = case.tensors

    def rows(index):
        picked = (x[index], w_gate_up, w_down, ids[index], weights[index])
        return fused_experts(*picked, backend=name, batch_invariant=True)

    everything = rows(torch.arange(40))
    for T in (1, 2, 3, 5, 8, 13, 21, 34):
        assert torch.equal(rows(torch.arange(T)), everything[:T]), T
    order = torch.randperm(40)
    assert torch.equal(rows(order), everything[order])


def test_auto_takes_strided_weights_by_the_portable_path():
    case = make_case(4, 2, 3, 32, 16)
    x, w_gate_up, w_down, ids, weights = case.tensors
    strided = w_down.transpose(1, 2).contiguous().transpose(1, 2)
    check_experts(fused_experts(x, w_gate_up, strided, ids, weights), case)
    if "cpu" in HERE:
        with pytest.raises(RuntimeError, match="contiguous weights"):
            fused_experts(x, w_gate_up, strided, ids, weights, backend="cpu")


def test_auto_is_differentiable():
    x, w_gate_up, w_down, ids, weights = make_case(4, 2, 3, 32, 16).tensors
    x.requires_grad_()
    fused_experts(x, w_gate_up, w_down, ids, weights).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    if "cpu" in HERE:
        with pytest.raises(RuntimeError, match="no backward pass"):
            fused_experts(x, w_gate_up, w_down, ids, weights, backend="cpu")


def test_unavailable_backend_raises_with_the_reason():
    for name, reason in available_backends().items():
        if reason is not None:
            case = make_case(2, 1, 2, 8, 4)
            with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run this call"):
                fused_experts(*case.tensors, backend=name)


@pytest.fixture
def nothing_chosen(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(api, "_quick", {})
    choose_backend.cache_clear()
    yield
    choose_backend.cache_clear()


@pytest.mark.usefixtures("nothing_chosen")
def test_auto_logs_its_choice_once(caplog):
    case = make_case(2, 1, 2, 8, 4)
    with caplog.at_level(logging.INFO, "moesd_kernels.experts.backends"):
        fused_experts(*case.tensors)
        fused_experts(*case.tensors)
    assert len([r for r in caplog.records if "use backend" in r.getMessage()]) == 1


@pytest.mark.usefixtures("nothing_chosen")
def test_auto_falls_back_and_says_why(caplog, monkeypatch):
    from moesd_kernels.experts import cpu

    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "no C++ compiler found")
    case = make_case(4, 2, 3, 32, 16)
    with caplog.at_level(logging.WARNING, "moesd_kernels.experts.backends"):
        check_experts(fused_experts(*case.tensors), case)
    assert "'torch'" in caplog.text and "no C++ compiler found" in caplog.text


def test_auto_never_takes_an_unmeasured_backend():
    assert not BACKENDS["cuda"].automatic
    with pytest.raises(RuntimeError, match=r"runs on cuda tensors, got cpu"):
        choose_backend("cuda", CallTraits("cpu", torch.bfloat16))


def test_the_baseline_is_not_the_reference():
    """The bound means something only if eager rounding differs from the fp32 reference."""
    case = make_case(8, 2, 4, 64, 32, torch.bfloat16)
    reference = fused_experts(*case.tensors, backend="reference")
    assert not torch.equal(eager_experts(case), reference)
