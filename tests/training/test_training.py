"""The training recipe: a fixed split, repeatable streams, right experts and EAGLE head."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from decoder import embedded
from training import experts, teacher
from training.__main__ import PARTS, install
from training.data import HELD_OUT_SHARE, TokenStream, docstrings, is_held_out, source_files
from training.eagle import Eagle
from training.optim import Budget, orthogonalize
from training.teacher import Rows, TeacherBatches, continuations, load_writer


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def stdlib(tmp_path):
    body = f'"""{"A long documentation string of module number one. " * 5}"""\n'
    for name in ("a.py", "json/b.py", "test/test_c.py", "site-packages/x.py", "encodings/cp1.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body + f"name = {name!r}\n" + "x = 1\n" * 40)
    return tmp_path


def test_split_is_deterministic_and_near_its_share():
    names = [f"package/module_{i}.py" for i in range(4000)]
    held_out = {n for n in names if is_held_out(n)}
    assert held_out == {n for n in reversed(names) if is_held_out(n)}
    assert abs(len(held_out) / len(names) - HELD_OUT_SHARE) < 0.01


def test_split_does_not_move_between_versions():
    """Known answers: a changed hash would silently put held-out files into training."""
    assert [n for n in (f"m{i}.py" for i in range(100)) if is_held_out(n)] == ["m56.py"]


def test_sources_skip_installed_packages_and_tables(stdlib):
    names = [name for name, _ in source_files(stdlib)]
    assert names == sorted(names)
    assert {"a.py", "json/b.py"} <= set(names) <= {"a.py", "json/b.py", "test/test_c.py"}


def test_docstrings_are_cleaned_and_long():
    text = "First line.\n\n        Indented details that go on " + "and on " * 30
    source = f'def f():\n    """{text}"""\n\ndef g():\n    """Short."""\n'
    found = docstrings(source)
    assert len(found) == 1
    assert "\n\nIndented" in found[0]
    assert docstrings("def broken(:") == []


def test_stream_repeats_and_shifts_labels():
    documents = {"code": [list(range(10, 500))], "prose": [list(range(600, 900))]}
    first, second = (TokenStream(documents, {"code": 0.5, "prose": 0.5}, eos=0) for _ in range(2))
    for _ in range(5):
        a, b = first.batch(4, 16), second.batch(4, 16)
        assert a.shape == (4, 17)
        assert torch.equal(a, b)
    assert first.epochs["code"] >= 1


def test_stream_goes_on_from_a_file_of_tensors(tmp_path):
    documents = {"code": [list(range(10, 500))], "prose": [list(range(600, 900))]}
    first, second = (TokenStream(documents, {"code": 0.5, "prose": 0.5}, eos=0) for _ in range(2))
    first.batch(4, 16)
    torch.save(first.state_dict(), tmp_path / "stream.pt")
    second.load_state_dict(torch.load(tmp_path / "stream.pt", weights_only=True))
    for _ in range(5):
        assert torch.equal(first.batch(4, 16), second.batch(4, 16))
    assert first.epochs == second.epochs


def test_a_stream_of_too_little_text_says_so():
    with pytest.raises(ValueError, match="expected more than 16 tokens of chat, got 3"):
        TokenStream({"chat": [[7, 8]]}, {"chat": 1.0}, eos=0).batch(1, 16)


@pytest.mark.parametrize("spent", [0, 9, 10])
def test_rows_are_of_both_kinds_however_small_the_budget(tmp_path, monkeypatch, spent):
    """Another stage draws from both."""

    def annotated(model, ids):
        parts = (
            ids.short(),
            ids[..., None].bfloat16(),
            ids[..., None].short(),
            ids[..., None].half(),
        )
        return Rows(*parts)

    def continued(writer, prompts, *settings, seed):
        return torch.tensor(prompts)[:, :1].expand(-1, teacher.ROW)

    monkeypatch.setattr(teacher, "annotate", annotated)
    monkeypatch.setattr(teacher, "continuations", continued)
    tokenizer = AutoTokenizer.from_pretrained(embedded.target_path())
    tokens = {"train": {kind: [list(range(5, 900))] for kind in teacher.SHARES}}
    tokens["train"]["code"] += [tokenizer("def f(x):\n" * 200)["input_ids"]]
    budget = Budget(None, 10)
    budget.tokens_done = spent
    teacher.build_rows(None, None, tokens, tokenizer, tmp_path, budget)
    assert len(TeacherBatches(tmp_path).batch(5).ids) == 5


def test_sorted_experts_equal_eager_with_gradients():
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=8, moe_intermediate_size=6, num_experts=5)
    config._experts_implementation = "eager"
    layer = Qwen3MoeExperts(config).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(7)])  # the last expert gets no row
    weights = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
    inputs = [x, weights, *layer.parameters()]
    results = []
    for forward in (layer, lambda *a: experts.sorted_experts_forward(layer, *a)):
        out = forward(x, ids, weights)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)


def test_eagle_depths_equal_drafting_step_by_step():
    """The unrolled training form computes what a drafter does, one branch at a time."""
    head, length, depths = Eagle(), 9, 3
    embeds, features = torch.randn(1, length, 256), torch.randn(1, length, 256)
    with torch.no_grad():
        unrolled = head.depths(embeds, features, depths)
        for start in range(length - depths):
            mixed = features.clone()
            for depth in range(depths):
                at = start + depth
                sequence = head(embeds[:, : at + 1], mixed[:, : at + 1], [])[:, -1]
                torch.testing.assert_close(unrolled[depth][:, at], sequence, rtol=1e-4, atol=1e-4)
                mixed[:, at + 1] = sequence


def test_the_targets_own_text_follows_its_prompts_and_repeats_with_its_seed():
    from decoder.embedded import target_path

    writer = load_writer(target_path())
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]
    greedy = continuations(writer, prompts, 0.0, 6, pad=1)
    assert greedy.shape == (2, 10)
    assert greedy[:, :4].tolist() == prompts
    drawn = [continuations(writer, prompts, 1.0, 6, pad=1, seed=s) for s in (3, 3, 40)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_orthogonalize_flattens_singular_values_per_expert():
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 12, 40)))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_budget_by_tokens_ignores_time():
    budget = Budget(None, 1000)
    budget.tokens_done = 500
    assert budget.progress == 0.5
    assert budget.lr_factor(decay_from=0.35) == pytest.approx(0.5 / 0.65)
    with pytest.raises(ValueError, match="expected minutes or tokens"):
        Budget(None, None)


def test_importing_the_pair_loads_no_transformers():
    code = "import sys, decoder.embedded; print('transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_rows_depend_on_the_seed_and_on_what_was_drawn() -> None:
    documents = {"code": [list(range(9)), list(range(20, 33))], "chat": [list(range(50, 70))]}
    shares = {"code": 0.5, "chat": 0.5}
    one, two = (TokenStream(documents, shares, 99, seed=3) for _ in range(2))
    first = one.batch(6, 3)
    torch.testing.assert_close(two.batch(6, 3), first)
    two.load_state_dict(one.state_dict())
    torch.testing.assert_close(two.batch(6, 3), one.batch(6, 3))
    known = {t for kind in documents.values() for text in kind for t in text} | {99}
    assert first.shape == (6, 4) and set(first.flatten().tolist()) <= known


def test_an_unfinished_pair_is_not_installed(tmp_path) -> None:
    """A new target beside the old draft and tokenizer would be a package that fits nowhere."""
    run_dir, assets = tmp_path / "run", tmp_path / "assets"
    for root, parts, text in ((run_dir, ("target", "tokenizer"), "new"), (assets, PARTS, "old")):
        for part in parts:
            (root / part).mkdir(parents=True)
            (root / part / "file").write_text(text)
    with pytest.raises(FileNotFoundError, match="got no draft, eagle"):
        install(run_dir, assets)
    assert [(assets / part / "file").read_text() for part in PARTS] == ["old"] * 4
    for part in ("draft", "eagle"):
        (run_dir / part).mkdir()
        (run_dir / part / "file").write_text("new")
    install(run_dir, assets)
    assert [(assets / part / "file").read_text() for part in PARTS] == ["new"] * 4
