"""The card says what was measured, resumes what was interrupted, and admits what was missed."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.eagle_reference import LAYER, H, norm, random_layer, save
from support.tiny import VOCAB, save_tokenizer, tiny_model

from training.upcycle.card import __main__ as card
from training.upcycle.card.journal import Journal, fingerprint
from training.upcycle.card.render import render

WORDS = ["<unk>", "<|endoftext|>", *(f"w{i}" for i in range(2, VOCAB))]


def test_a_journal_goes_on_behind_its_last_whole_line(tmp_path: Path) -> None:
    path, calls = tmp_path / "cells.jsonl", []

    def measure(value: int) -> dict[str, Any]:
        calls.append(value)
        return {"value": value}

    first = Journal(path)
    first.cell({"a": 1, "b": 2}, measure, 10)
    first.cell({"a": 2}, measure, 20)
    path.write_text(path.read_text()[:-4])  # interrupted while it was writing

    second = Journal(path)
    second.cell({"b": 2, "a": 1}, measure, 11)
    second.cell({"a": 2}, measure, 21)
    third = Journal(path)
    third.cell({"a": 2}, measure, 22)
    assert calls == [10, 20, 21]
    assert [(cell["a"], cell["value"]) for cell in second.cells] == [(1, 10), (2, 21)]
    assert [cell["value"] for cell in third.cells] == [21]  # only what was asked for


def test_a_fingerprint_is_of_all_weights(tmp_path: Path) -> None:
    for name, content in (("a.safetensors", b"1"), ("b.safetensors", b"2"), ("config.json", b"3")):
        (tmp_path / name).write_bytes(content)
    before = fingerprint(tmp_path)
    (tmp_path / "config.json").write_bytes(b"4")
    assert fingerprint(tmp_path) == before
    (tmp_path / "b.safetensors").write_bytes(b"5")
    assert fingerprint(tmp_path) != before


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    """A run directory, tiny models and prompts, as the flags would name them."""
    root = tmp_path_factory.mktemp("card")
    for name, family in (("target", "mixtral"), ("dense", "llama")):
        changes = {} if family == "llama" else {"num_experts_per_tok": 2}
        tiny_model(family, torch.bfloat16, num_hidden_layers=6, **changes).save_pretrained(
            root / name
        )
        save_tokenizer(root / name, WORDS)
    head = random_layer("midlayer", 2 * H, 0) | {
        "midlayer.hidden_norm.weight": norm(H, 1),
        "midlayer.input_layernorm.weight": norm(H, 2),
        "norm.weight": norm(H, 3),
        "fc.weight": torch.randn(H, 3 * H) / H,
        "lm_head.weight": torch.randn(8, H),
        "d2t": torch.arange(8),
    }
    save(root / "eagle", {**LAYER, "draft_vocab_size": 8}, head)
    held_out = {
        kind: [torch.randint(VOCAB, (700,)) for _ in range(2)] for kind in ("code", "docs", "chat")
    }
    torch.save({"held_out": held_out}, root / "texts.pt")
    facts = {"tokens": 1234567, "minutes": 7.5, "device": "cpu", "seed": 20}
    (root / "target.json").write_text(json.dumps(facts))
    sources = {"versions": {"python": "3.11", "rich": "13.0"}, "sha256": "abc"}
    (root / "sources.json").write_text(json.dumps(sources))
    prompts = root / "prompts.jsonl"
    lines = [{"id": f"{d}/{i}", "prompt": "w5 w9 w7"} for d in ("code", "chat") for i in range(2)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    human_eval = root / "HumanEval.jsonl.gz"
    problem = {"prompt": "w7 " * 700, "canonical_solution": "w9 " * 400, "test": "no"}
    human_eval.write_bytes(gzip.compress(json.dumps(problem).encode()))
    return argparse.Namespace(
        run_dir=root,
        **{name: root / name for name in ("target", "dense", "eagle")},
        draft=root / "dense",
        outside=[f"HumanEval={human_eval}"],
        windows=2,
        prompts=prompts,
        new_tokens=6,
        device="cpu",
    )


@pytest.fixture(scope="module")
def record(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    return {"training": card.training_facts(args.run_dir), "evaluation": card.evaluation(args)}


def test_a_second_start_measures_nothing(
    args: argparse.Namespace, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "load_model", lambda *a, **k: pytest.fail("loaded a model"))
    assert card.evaluation(args) == record["evaluation"]


def test_the_card_has_every_number(record: dict[str, Any], tmp_path: Path) -> None:
    card.write_record(tmp_path / "record.json", record)
    text = render(json.loads((tmp_path / "record.json").read_text()))
    assert "$" not in text
    assert "| target | 1,234,567 | 7.5 | cpu | 20 |" in text
    assert "python 3.11, rich 13.0" in text
    cells = record["evaluation"]["cells"]
    dense = [c for c in cells if c["kind"] == "loss" and c["top_k"] is None]
    assert [c["domain"] for c in dense] == [
        *("code", "docs", "chat", "language reference", "C++", "HumanEval"),
    ]
    for cell in dense:
        mean = sum(cell["losses"]) / len(cell["losses"])
        part = cell["part"].replace("_", " ")
        assert f"| {cell['domain']}, {part} | {cell['tokens']:,} | {mean:.3f} |" in text
    for cell in cells:
        if cell["kind"] == "acceptance" and cell["alpha"] is not None:
            assert f"{cell['alpha']:.3f} · {cell['tokens_per_round']:.2f}" in text
    assert "| EAGLE-3 | 1 | coupled |" in text
    assert "in 4 of 4 comparisons" in text  # two domains, greedy and coupled
    assert text.count("\n| 5 | ") == 1  # the last layer's load


def changed(record: dict[str, Any], shift: dict[Any, float], alpha: float) -> str:
    """The card if losses at some K were the dense ones and a shift, and all alphas the same."""
    cells = [dict(cell) for cell in record["evaluation"]["cells"]]
    dense = {c["domain"]: c["losses"] for c in cells if c.get("top_k", 0) is None}
    for cell in cells:
        if cell["kind"] == "acceptance":
            cell["alpha"] = alpha
        elif cell["top_k"]:
            step = shift.get((cell["part"], cell["top_k"]), 0.0)
            cell["losses"] = [
                loss * (1 + step + 1e-4 * (i % 2)) for i, loss in enumerate(dense[cell["domain"]])
            ]
    evaluation = {**record["evaluation"], "cells": cells}
    return render({**record, "evaluation": evaluation})


GOOD = {("held_out", 1): 0.1, ("held_out", 2): -0.01, ("outside", 2): 0.01}


@pytest.mark.parametrize(
    ("shift", "alpha", "missed"),
    [
        (GOOD, 0.9, []),
        ({**GOOD, ("held_out", 2): 0.001}, 0.9, ["held-out loss not above"]),
        ({**GOOD, ("outside", 2): 0.021}, 0.9, ["at most 2% above"]),
        (
            {**GOOD, ("held_out", 1): -0.01},
            0.9,
            ["K = 1 worse"],
        ),  # as a copy of one expert would be
        (GOOD, 1.0, ["not always right"]),
    ],
)
def test_a_claim_that_does_not_hold_is_said_to_be_missed(
    record: dict[str, Any], shift: dict[Any, float], alpha: float, missed: list[str]
) -> None:
    lines = changed(record, shift, alpha).splitlines()
    found = [line for line in lines if line.startswith("- **Missed**: ")]
    assert len(found) == len(missed)
    assert all(claim in line for claim, line in zip(missed, found, strict=True))
    assert sum(line.startswith("- Held: ") for line in lines) == 4 - len(missed)
