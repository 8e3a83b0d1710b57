"""The lean forward is bit-identical to the model's own, and absent where it could not be."""

import copy
import pickle

import pytest
import torch
from support.tiny import MOE_VOCAB, ragged_prompts

from decoder.model import kernels, probe
from decoder.model.runner import ModelRunner
from moesd_kernels.dense import ops
from moesd_kernels.hooks.walk.joined import joined

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))
torch.set_num_threads(1)

SHAPE = {
    "vocab_size": MOE_VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "Llama": {"attention_bias": True},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3": {"head_dim": 16},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "Qwen3Moe": {**EXPERTS, "head_dim": 16},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def build(family, dtype, **changes):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE | FAMILIES.get(family, {}) | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for parameter in model.parameters():  # biases and norms that would otherwise be neutral
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    kernels.accelerate(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_bit_identical_to_the_models_own_forward(family, dtype):
    model = build(family, dtype)
    runner = ModelRunner(model, 4, 64)
    lean = runner._lean
    assert lean is not None, f"{family} fell back"
    prompts = ragged_prompts(3, seed=8)
    width = max(map(len, prompts))
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts])
    lengths, rows = torch.tensor([len(p) for p in prompts]), torch.tensor([2, 0, 3])
    tokens = torch.randint(1, MOE_VOCAB, (3, 4))
    results = []
    for choice in (lean, None):
        runner._lean = choice
        first = runner.prefill(rows, ids, lengths)
        out = runner.forward(
            tokens, rows, lengths[:, None] + torch.arange(4), hidden_layers=(0, 1, -1)
        )
        results.append((first.logits, out.logits, out.hidden))
    for mine, own in zip(*results, strict=True):
        assert torch.equal(mine, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.inference_mode()
def test_few_logits_are_those_of_all_and_the_cache_is_written_whole(family, dtype):
    """Where few logits are wanted, the last layer computes nothing else."""
    runner = ModelRunner(build(family, dtype), 3, 64)
    inputs = torch.randint(1, MOE_VOCAB, (2, 5)), torch.tensor([2, 0]), torch.arange(5).repeat(2, 1)
    every = runner.forward(*inputs).logits
    layers = runner.cache.ragged_layers
    written = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
    for columns in ([[4], [1]], [[3, 0, 3], [2, 4, 1]], [[], []]):
        wanted = torch.tensor(columns, dtype=torch.long)
        for layer in layers:
            layer.keys.zero_(), layer.values.zero_()
        some = runner.forward(*inputs, logits_positions=wanted).logits
        assert torch.equal(some, every.take_along_dim(wanted[..., None], dim=1))
        for layer, (keys, values) in zip(layers, written, strict=True):
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_mlps_run_as_modules_where_someone_looks_at_them(family):
    """As self-drafting does to the experts, for which the forward is told so."""
    model = build(family, torch.bfloat16)
    runner = ModelRunner(model, 2, 64)
    inputs = torch.tensor([[5, 6, 7], [8, 9, 1]]), torch.arange(2), torch.arange(3).repeat(2, 1)
    plain, whole, calls = runner.forward(*inputs).logits, runner._lean, []
    handles = [m.mlp.register_forward_hook(lambda *_: calls.append(1)) for m in model.model.layers]
    with torch.inference_mode():
        assert torch.equal(runner.run(*inputs, 3, most_experts=1)[0], plain)
    assert len(calls) == 2 and runner._lean is whole
    assert torch.equal(runner.forward(*inputs).logits, plain)
    assert len(calls) == 4 and not runner._lean.whole
    for handle in handles:
        handle.remove()
    assert torch.equal(runner.forward(*inputs).logits, plain)
    assert len(calls) == 4 and runner._lean.whole == whole.whole


@pytest.fixture(params=[1, 2])
def threads(request):
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_continuation_is_that_of_single_forwards(family, dtype, threads):
    """From two tokens per row, one of which is padding: the same choices and the same cache, also
    where two threads take the rows apart."""
    runner = ModelRunner(build(family, dtype), 4, 64)
    rows, lengths = torch.tensor([2, 0, 3]), torch.tensor([7, 3, 9])
    prompts, ids = torch.randint(1, MOE_VOCAB, (3, 9)), torch.randint(1, MOE_VOCAB, (3, 2))
    start = torch.stack([lengths - 1, lengths], dim=1)
    start[1, 0] = -1
    runner.prefill(rows, prompts, lengths)
    together = runner.continue_greedily(ids, rows, start, 4, 9)
    if family == "Qwen2Moe":  # its shared expert runs as a module, between the layers
        assert together is None
        return
    tokens, undefined = together
    layers = runner.cache.ragged_layers
    written = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
    runner.prefill(rows, prompts, lengths)
    fed, positions, chosen = ids, start, []
    for _ in range(4):
        logits = runner.forward(fed, rows, positions).logits[:, -1:]
        fed, positions = logits.float().argmax(-1), positions[:, -1:] + 1
        chosen.append(fed)
    assert torch.equal(tokens, torch.cat(chosen, dim=1))
    assert not undefined.any()
    for layer, (keys, values) in zip(layers, written, strict=True):
        for now, then in ((layer.keys, keys), (layer.values, values)):
            assert torch.equal(now[rows, :14], then[rows, :14])


def test_greedy_continuation_says_where_logits_have_no_largest():
    model = build("Qwen3", torch.float32)
    runner = ModelRunner(model, 1, 32)
    model.lm_head.weight.data.fill_(float("nan"))
    one = torch.zeros(1, 1, dtype=torch.long)
    _, undefined = runner.continue_greedily(one, one[0], one, 2, 0)
    assert undefined.all()


def test_not_used_without_our_kernels_or_for_other_shapes():
    model = build("Olmoe", torch.float32, num_experts=4, num_experts_per_tok=2)
    assert ModelRunner(model, 1, 32)._lean is None
    model = build("Qwen3", torch.float32)
    assert ModelRunner(model, 1, 32, attention="portable")._lean is None
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert ModelRunner(build("Llama", torch.float32, rope_parameters=dynamic), 1, 32)._lean is None


def test_joined_weights_are_the_models_own_memory(tmp_path):
    model = build("Qwen3", torch.float32)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    attention, places = model.model.layers[0].self_attn, []
    for runner in (ModelRunner(model, 1, 32), ModelRunner(model, 1, 32)):
        assert runner._lean is not None
        queries, keys = attention.q_proj.weight, attention.k_proj.weight
        assert keys.data_ptr() == queries.data_ptr() + queries.nbytes
        places.append(queries.data_ptr())
    assert places[0] == places[1]
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in again.state_dict().items())


def test_joined_does_not_mistake_neighbours_for_one_tensor():
    whole = torch.nn.Parameter(torch.arange(12.0).view(6, 2))
    parts = [torch.nn.Parameter(whole.data[4:6]), torch.nn.Parameter(whole.data[0:2])]
    assert torch.equal(joined(parts), torch.cat([whole.data[4:6], whole.data[0:2]]))


def test_what_shares_memory_with_other_tensors_is_not_moved():
    """A state dict that is held goes on following the weights, as does another process's model."""
    model = build("Qwen3", torch.float32)
    held = model.state_dict()
    runner = ModelRunner(model, 1, 32)
    assert runner._lean is None
    name = "model.layers.0.self_attn.q_proj.weight"
    assert held[name].data_ptr() == model.get_parameter(name).data_ptr()
    del held
    assert ModelRunner(model, 1, 32)._lean is not None
    shared = build("Qwen3", torch.float32).share_memory()
    assert ModelRunner(shared, 1, 32)._lean is None


@pytest.mark.parametrize(
    ("dtype", "apart", "rounding", "taken"),
    [
        (torch.bfloat16, 0.05, 0.0, True),
        (torch.bfloat16, 0.15, 0.1, True),
        (torch.bfloat16, 0.15, 0.05, False),
        (torch.bfloat16, float("inf"), 9.0, False),
        (torch.bfloat16, float("nan"), 9.0, False),
        (torch.float32, 0.15, 0.1, False),
    ],
    ids=str,
)
def test_states_may_differ_by_what_the_model_makes_of_a_rounding(
    monkeypatch, dtype, apart, rounding, taken
):
    """On a GPU sums have other orders, and a deep model's routers and sharp attention multiply
    their rounding: states of the presets' random models differ by a tenth."""
    model = build("Qwen2Moe", dtype)
    monkeypatch.setattr(kernels.walk(), "states_apart", lambda *_: apart)
    monkeypatch.setattr(probe, "_sensitivity", lambda *_: rounding)
    assert (ModelRunner(model, 1, 32)._lean is not None) == taken


def test_weights_can_be_trained_and_stored_as_before(tmp_path):
    model = build("Qwen2", torch.float32)
    plain, parameters = build("Qwen2", torch.float32), dict(model.named_parameters())
    plain.save_pretrained(tmp_path / "plain")
    with torch.inference_mode():
        for _ in range(3):
            assert ModelRunner(model, 1, 32)._lean is not None
    model.save_pretrained(tmp_path / "ours")
    bytes_of = lambda name: (tmp_path / name / "model.safetensors").read_bytes()
    assert bytes_of("plain") == bytes_of("ours")
    assert list(model.state_dict()) == list(plain.state_dict())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    assert sum(map(len, storages.values())) == sum(p.nbytes for p in plain.parameters())
    ids = torch.tensor([[5, 6, 7, 8]])
    losses = []
    for trained in (model, plain, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        trained(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        losses.append(trained(ids, labels=ids, use_cache=False).loss.item())
    assert losses[0] == losses[1] == losses[2] == losses[3]
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    runner = ModelRunner(model, 1, 32)
    trained = runner.forward(ids, torch.zeros(1, dtype=torch.long), torch.arange(4)[None]).logits
    torch.testing.assert_close(trained, model(ids, use_cache=False).logits.detach())
