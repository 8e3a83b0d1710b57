"""The lean forward on a GPU's kernels, interpreted: the model's results, in few launches."""

from collections import Counter

import pytest
import torch
import transformers
import triton.runtime.interpreter as interpreter
from support.interpreted import matrix_instruction as matrix_instruction
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import moesd_kernels
from decoder.drafters.self_draft import ReducedRouting, find_experts
from decoder.model import kernels
from decoder.model.runner import ModelRunner
from moesd_kernels.dense.triton import attention
from moesd_kernels.hooks.walk import by_device, device_stack
from moesd_kernels.hooks.walk.device_stack import DeviceStack

SHAPE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "Mistral": {"sliding_window": 5},
    "Qwen2": {},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": {**EXPERTS, "head_dim": 16},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
# Of a layer's step, a row's keys in one block and in several. A product is one; what torch would
# launch by itself counts as well.
LAUNCHES = {
    "Mistral": (8, 9),
    "Qwen2": (8, 9),
    "Qwen2Moe": (10, 11),
    "Qwen3Moe": (8, 9),
    "Mixtral": (8, 9),
}
ROWS = 3


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Tensors of the CPU pass for a GPU's, whose kernels are interpreted."""
    for place in (kernels, by_device):
        monkeypatch.setattr(place, "on_gpu", lambda device: True)
    # A row has no more blocks of keys here, and the interpreter takes as long for one that is not.
    monkeypatch.setattr(attention, "UNROLL", 2)


def build(family, batch_invariant=False):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE | FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():  # biases and norms that would otherwise be neutral
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return moesd_kernels.accelerate(model, dense=False, batch_invariant=batch_invariant)


class Launches(TorchDispatchMode):
    """Counts launches: of our kernels, and of torch's operators that are no views."""

    FREE = (
        *("view", "reshape", "as_strided", "slice", "select", "split", "unbind", "chunk", "expand"),
        *("transpose", "t.", "permute", "flatten", "unsqueeze", "alias", "detach", "empty"),
    )

    def __init__(self, monkeypatch):
        super().__init__()
        self.counted = Counter()
        run = interpreter.GridExecutor.__call__

        def counted(executor, *args, **kwargs):
            self.counted[executor.fn.__name__] += 1
            with _disable_current_modes():  # what the interpreter computes by torch
                return run(executor, *args, **kwargs)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if not name.startswith(self.FREE):
            self.counted[name] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_models_own_results_in_few_launches(family, monkeypatch):
    model = build(family)
    ids = torch.randint(1, 50, (ROWS, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
    runner = ModelRunner(model, 4, 62, static=True)
    stack = runner._lean._stack
    assert isinstance(stack, DeviceStack) and runner._lean.whole
    rows, columns = torch.arange(ROWS), torch.arange(9).expand(ROWS, -1)
    runner.forward(ids[:, :6], rows, columns[:, :6], max_position=5)
    latest = torch.full((ROWS, 1), 2)
    step = ids[:, 6:], rows, columns[:, 6:].contiguous()
    got = runner.forward(*step, max_position=8, logits_positions=latest).logits
    torch.testing.assert_close(got, expected[:, -1:], rtol=1e-4, atol=1e-4)

    if "num_experts_per_tok" in FAMILIES[family]:
        check_fewer_experts(runner, step, monkeypatch)

    launches, run = Launches(monkeypatch), DeviceStack.run

    def watched(self, *args):
        launches.counted.clear()
        with launches:
            return run(self, *args)

    monkeypatch.setattr(DeviceStack, "run", watched)
    got = runner.forward(*step, max_position=8).logits
    torch.testing.assert_close(got, expected[:, 6:], rtol=1e-4, atol=1e-4)
    assert launches.counted.total() == LAUNCHES[family][1], launches.counted
    monkeypatch.setattr(runner, "_graphs", None)  # whose shortest view is two blocks of fp32 keys
    runner.forward(*step, max_position=8)
    assert launches.counted.total() == LAUNCHES[family][0], launches.counted
    assert runner.continue_greedily(*step, 2, 8) is None  # a step by itself, on a GPU


@pytest.mark.parametrize("family", ["Qwen3Moe"])
def test_prompts_take_the_same_walk(family, monkeypatch):
    """Too long for fixed buffers, ragged, their last logits alone."""
    model = build(family)
    ids = torch.randint(1, 50, (2, 35), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([35, 21])
    with torch.no_grad():
        every = model(ids).logits
    runner = ModelRunner(model, 4, 62, static=True)
    walks, run = [], DeviceStack.run
    monkeypatch.setattr(DeviceStack, "run", lambda *args: walks.append(args) or run(*args))
    logits = runner.prefill(torch.tensor([2, 0]), ids, lengths).logits
    assert walks and len(runner._graphs) == 0
    torch.testing.assert_close(logits[:, 0], every[[0, 1], lengths - 1], rtol=1e-4, atol=1e-4)


def check_fewer_experts(runner, step, monkeypatch):
    """Those that a hook on the experts leaves, where the model runs module by module."""
    reduced = ReducedRouting(find_experts(runner.model), 1)
    with reduced(), torch.inference_mode(), monkeypatch.context() as patch:
        walked, _ = runner.run(*step, 9, most_experts=1)
        assert runner.limits_experts and not reduced.calls
        patch.setattr(runner, "_lean", None)
        expected, _ = runner.run(*step, 9)
    assert reduced.calls == 1
    torch.testing.assert_close(walked, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "dtype"), [("Qwen2", torch.float16), ("Qwen2Moe", torch.float32)], ids=str
)
def test_rows_do_not_depend_on_the_batch(family, dtype, monkeypatch, matrix_instruction):
    """A verification's positions are single steps, and a row's neighbours nobody, to the bit."""
    monkeypatch.setattr(device_stack, "FEW_ROWS", 1)  # where the choice is cuBLAS's otherwise
    monkeypatch.setattr(device_stack, "MAX_PAIRS", 4)
    runner = ModelRunner(build(family, batch_invariant=True).to(dtype), 4, 62)
    assert runner._lean._stack.batch_invariant and runner._lean.whole
    ids = torch.randint(1, 50, (ROWS, 9), generator=torch.Generator().manual_seed(1))
    rows, columns = torch.arange(ROWS), torch.arange(9).expand(ROWS, -1)
    runner.forward(ids[:, :6], rows, columns[:, :6], max_position=5)
    verified = runner.forward(ids[:, 6:], rows, columns[:, 6:].contiguous(), max_position=8).logits
    for i in (6, 8):
        step = ids[1:2, i : i + 1], rows[1:2], torch.tensor([[i]])
        alone = runner.forward(*step, max_position=i).logits
        assert torch.equal(alone, verified[1:2, i - 6 : i - 5])


def test_a_head_that_the_kernel_does_not_take_runs_without_it(monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("a head is too wide")

    monkeypatch.setattr("moesd_kernels.dense.triton.attention.ragged_attention", refuse)
    runner = ModelRunner(build("Qwen2"), 4, 62, static=True)
    assert runner._op is None and runner._lean is None


@pytest.mark.parametrize("family", ["Qwen2Moe", "Qwen3Moe"])
def test_tokens_are_read_without_logits(family):
    """As a draft model catches up with a text: its last layer then has no token."""
    model = build(family)
    ids = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
    runner = ModelRunner(model, 4, 62, static=False)
    rows, columns = torch.arange(2), torch.arange(9).expand(2, -1)
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    logits = runner.forward(ids[:, :8], rows, columns[:, :8], logits_positions=nothing).logits
    assert logits.shape == (2, 0, 50)
    logits = runner.forward(ids[:, 8:], rows, columns[:, 8:].contiguous()).logits
    torch.testing.assert_close(logits, expected[:, 8:], rtol=1e-4, atol=1e-4)
