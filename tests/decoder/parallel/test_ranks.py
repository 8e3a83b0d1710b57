"""Two and four ranks on gloo: the tokens of one process, and no work that another rank does.

Tokens are compared with one process in fp32: a sum over ranks adds the same numbers in another
order than it does, which rounds otherwise, and in bf16 can turn a near-tie. Speculative output is
that of plain decoding on the same ranks in bf16 as well: a row's bits do not depend on the batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import processes as ranks
from support.ranks import work as rank_work
from support.tiny import tiny_model

from decoder.model.loading import load_model

# Divisible by four ranks; what each family is here for.
SIZES: dict[str, Any] = {"num_key_value_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},  # walked by the stack where dense layers are whole
    "qwen2_moe": {"tie_word_embeddings": True},  # biases, a shared expert, a tied head
    "olmoe": {},  # norms across heads, for which projections are gathered
    "gpt_oss": {},  # biases of experts, sinks
    "deepseek_v3": {},  # latent attention, dense layers, a correction of the router
}
EVERY = [("none", 0), ("ngram", 3), ("independent", 2), ("self", 2), ("ngram", "auto")]
TWO = [
    ("expert", "qwen3_moe", "fp32", EVERY),
    ("tensor", "qwen3_moe", "fp32", [("ngram", 3), ("self", 2)]),
    ("tensor", "qwen2_moe", "fp32", [("ngram", 2)]),
    ("tensor", "olmoe", "fp32", [("ngram", 2)]),
    ("expert", "gpt_oss", "fp32", [("ngram", 2)]),
    ("tensor", "deepseek_v3", "fp32", [("ngram", 2)]),
]
FOUR = [
    ("expert", "qwen3_moe", "fp32", [("ngram", 3), ("self", 2)]),
    ("tensor", "qwen3_moe", "fp32", [("ngram", 3)]),
    ("tensor", "qwen3_moe", "bf16", [("none", 0), ("ngram", 3)]),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of one model of each family."""
    folder = tmp_path_factory.mktemp("models")
    for name, changes in FAMILIES.items():
        tiny_model(name, **{**SIZES, **changes}).save_pretrained(folder / name)
    draft = tiny_model("qwen3", seed=0, num_hidden_layers=1)
    draft.save_pretrained(folder / "draft")
    return {name: str(folder / name) for name in (*FAMILIES, "draft")}


@pytest.fixture(scope="module")
def expected(saved: dict[str, str]) -> dict[str, list[Any]]:
    """What one process decodes, plainly."""
    return {
        name: rank_work.decoded(load_model(saved[name], dtype=torch.float32)) for name in FAMILIES
    }


@pytest.mark.parametrize(("size", "cases"), [(2, TWO), (4, FOUR)])
def test_tokens_are_those_of_one_process(
    size: int,
    cases: list[Any],
    saved: dict[str, str],
    expected: dict[str, list[Any]],
    tmp_path: Path,
) -> None:
    told = [(mode, saved[name], dtype, drafters) for mode, name, dtype, drafters in cases]
    processes = ranks.start(size, rank_work.decode, tmp_path, told, saved["draft"], tmp_path)
    codes = ranks.join(processes)
    assert codes == [0] * size, [ranks.printed(tmp_path, rank)[-3000:] for rank in range(size)]
    outputs = iter(ranks.reported(tmp_path, 0)["outputs"])
    for mode, name, dtype, drafters in cases:
        found = [next(outputs) for _ in drafters]
        wanted = expected[name] if dtype == "fp32" else found[0]
        assert found == [wanted] * len(found), (mode, name, dtype, drafters)


def test_sums_are_in_order_and_experts_elsewhere_cost_nothing(
    saved: dict[str, str], tmp_path: Path
) -> None:
    assert ranks.join(ranks.start(4, rank_work.sums, tmp_path, tmp_path)) == [0] * 4
    assert all(all(ranks.reported(tmp_path, rank)["right"]) for rank in range(4))
    start = ranks.start(2, rank_work.count_expert_work, tmp_path, saved["qwen3_moe"], tmp_path)
    assert ranks.join(start) == [0, 0], ranks.printed(tmp_path, 0)
    found = [ranks.reported(tmp_path, rank) for rank in range(2)]
    assert [one["flops"] for one in found] == [one["expected"] for one in found]
    assert all(one["flops"] > 0 for one in found)


def test_decoders_in_two_threads_share_a_target(saved: dict[str, str], tmp_path: Path) -> None:
    """Other ranks run one forward after the other: sums of two must not meet."""
    start = ranks.start(2, rank_work.decode_in_threads, tmp_path, saved["qwen3_moe"], tmp_path)
    assert ranks.join(start) == [0, 0], ranks.printed(tmp_path, 0)
    assert ranks.reported(tmp_path, 0)["right"] == [True, True]
