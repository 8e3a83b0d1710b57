"""EAGLE heads of every published layout draft what their equations say, round after round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from support import eagle_reference as reference
from support.eagle_reference import LAYER, H, norm, random_layer, rms, save
from support.scripted import GreedySampler, Script
from support.tiny import VOCAB, random_prompts, tiny_model
from torch import Tensor

from decoder.drafters.eagle import EagleDrafter
from decoder.model.runner import ModelRunner

torch.set_num_threads(1)

DRAFT_VOCAB = 24
DEPTH = 6


class Case(NamedTuple):
    """A head on disk and its reference: ``fuse``, ``step`` and ``read`` of ``reference.draft``."""

    path: Path
    fuse: Callable[[Tensor], Tensor]
    step: Callable[[Tensor, Tensor], Tensor]
    read: Callable[[Tensor], int]


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny_model("qwen3_moe", num_hidden_layers=DEPTH)


@pytest.fixture(scope="module")
def runner(target: Any) -> ModelRunner:
    return ModelRunner(target, 4, 400)


def linear(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 1.5 * columns**-0.5


def eagle1_case(path: Path, target: Any, *, layout: str) -> Case:
    layers = 2 if layout == "two-layers" else 1
    w = random_layer("layers.0", H, 1)
    if layers == 2:
        w |= random_layer("layers.1", H, 5) | {"layers.1.input_layernorm.weight": norm(H, 9)}
    w["fc.weight"] = linear(H, 2 * H, 2)
    w["fc.bias"] = norm(H, 4) - 1
    config, tensors = {**LAYER, "architectures": ["LlamaForCausalLM"]}, dict(w)
    if layout == "speculators":
        config = {"speculators_model_type": "eagle", "transformer_layer_config": LAYER}
        tensors = {
            k.replace("layers.0.", "transformer.").replace("fc.", "fusion_fc."): v
            for k, v in w.items()
        }
    lm_head = target.get_output_embeddings().weight
    return Case(
        save(path, config, tensors),
        lambda features: features,
        lambda embeds, hidden: reference.eagle1(w, embeds, hidden, layers),
        lambda hidden: int((lm_head @ hidden).argmax()),
    )


def with_targets_lm_head(w: Any, tensors: Any, config: Any, target: Any, ids: Tensor) -> None:
    del tensors["lm_head.weight"]
    w["lm_head.weight"] = target.get_output_embeddings().weight[ids]


def with_ids(w: Any, tensors: Any, config: Any, target: Any, ids: Tensor) -> None:
    tensors["d2t"] = ids


def with_last_feature(w: Any, tensors: Any, config: Any, target: Any, ids: Tensor) -> None:
    config["eagle_config"] = {"use_aux_hidden_state": False}
    del tensors["fc.weight"]
    w["fc.weight"] = torch.eye(H)


# What some publishers do otherwise: changes of the reference's weights, the file and its config.
UNLIKE: dict[str, Callable[..., None]] = {
    "targets-lm_head": with_targets_lm_head,
    "ids": with_ids,
    "last-feature": with_last_feature,
}


def eagle3_case(path: Path, target: Any, *, layout: str) -> Case:
    w = random_layer("midlayer", 2 * H, 1) | {
        "midlayer.hidden_norm.weight": norm(H, 11),
        "midlayer.input_layernorm.weight": norm(H, 12),
        "fc.weight": linear(H, 3 * H, 13),
        "norm.weight": norm(H, 14),
        "lm_head.weight": linear(DRAFT_VOCAB, H, 15),
    }
    targets = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))[:DRAFT_VOCAB].sort()
    tensors = w | {
        "d2t": targets.values - torch.arange(DRAFT_VOCAB),
        "t2d": torch.zeros(VOCAB, dtype=torch.bool).scatter(0, targets.values, True),
    }
    config: dict[str, Any] = {**LAYER, "draft_vocab_size": DRAFT_VOCAB}
    extra = {}
    if layout in UNLIKE:
        UNLIKE[layout](w, tensors, config, target, targets.values)
    if layout == "nested-ids":  # counts layer outputs: the same layers as the default
        ids = [1, DEPTH // 2 - 1, DEPTH - 4]
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": ids}
    if layout == "qk-norm":
        tensors |= {f"midlayer.self_attn.{n}_norm.weight": norm(8, 20) for n in "qk"}
        w |= {f"midlayer.self_attn.{n}_norm.weight": norm(8, 20) for n in "qk"}
    if layout.startswith("speculators"):
        config = {
            "speculators_model_type": "eagle3",
            "transformer_layer_config": LAYER,
            "draft_vocab_size": DRAFT_VOCAB,
            "norm_before_residual": layout == "speculators-residual",
            "norm_before_fc": layout == "speculators-input-norm",
            "fc_norm": layout == "speculators-fc-norm",
            "norm_output": layout == "speculators-norm-output",
        }
        if layout == "speculators-input-norm":
            extra = {"input_norm.weight": norm(3 * H, 30)}
        if layout == "speculators-fc-norm":
            extra = {f"fc_norm.{i}.weight": norm(H, 31 + i) for i in range(3)}
        tensors = {k.replace("midlayer.", "layers.0."): v for k, v in tensors.items()} | extra

    def fuse(features: Tensor) -> Tensor:
        if "input_norm.weight" in extra:
            features = rms(features, extra["input_norm.weight"])
        if "fc_norm.0.weight" in extra:
            chunks = features.chunk(3, -1)
            features = torch.cat([rms(c, extra[f"fc_norm.{i}.weight"])
                                  for i, c in enumerate(chunks)], -1)  # fmt: skip
        return features @ w["fc.weight"].T

    def step(embeds: Tensor, hidden: Tensor) -> Tensor:
        out = reference.eagle3(
            w, embeds, hidden, residual_normed=bool(config.get("norm_before_residual"))
        )
        return rms(out, w["norm.weight"]) if config.get("norm_output") else out

    def read(hidden: Tensor) -> int:
        normed = hidden if config.get("norm_output") else rms(hidden, w["norm.weight"])
        return int(targets.values[(w["lm_head.weight"] @ normed).argmax()])

    return Case(save(path, config, tensors), fuse, step, read)


CASES = [
    (eagle1_case, "safetensors"),
    (eagle1_case, "two-layers"),
    (eagle1_case, "speculators"),
    (eagle3_case, "midlayer"),
    *((eagle3_case, layout) for layout in UNLIKE),
    (eagle3_case, "nested-ids"),
    (eagle3_case, "qk-norm"),
    (eagle3_case, "speculators"),
    (eagle3_case, "speculators-residual"),
    (eagle3_case, "speculators-input-norm"),
    (eagle3_case, "speculators-fc-norm"),
    (eagle3_case, "speculators-norm-output"),
]


@torch.no_grad()
def target_features(target: Any, sequence: list[int], layers: tuple[int, ...]) -> Tensor:
    out = target.model(torch.tensor([sequence]), output_hidden_states=True)
    return torch.cat([out.hidden_states[layer][0] for layer in layers], -1)


def start(case: Case, target: Any, runner: ModelRunner, rows: int) -> Script:
    drafter = EagleDrafter(case.path)
    drafter.bind(runner, GreedySampler(VOCAB), 6)  # type: ignore[arg-type]
    assert drafter.hidden_layers in ((-1,), (2, DEPTH // 2, DEPTH - 3))
    sequences = random_prompts(rows, seed=5, low=120, high=120)
    features = [target_features(target, s, drafter.hidden_layers) for s in sequences]
    script = Script(drafter, sequences, [2, 0, 3, 1][:rows], features)
    script.admit([1, 9, 4, 2][:rows])
    return script


def check_round(script: Script, case: Case, target: Any, gamma: int, accepted: list[int]) -> None:
    assert script.features is not None
    starts = list(script.lengths)
    draft = script.round(gamma, accepted)
    if draft is None:
        return
    embedding = target.get_input_embeddings().weight.detach()
    for row, length in enumerate(starts):
        fused = case.fuse(script.features[row][:length])
        tokens = script.sequences[row][: length + 1]
        expected = reference.draft(case.step, case.read, embedding, tokens, fused, gamma)
        assert draft.tokens[row].tolist() == expected, (row, length)


@pytest.mark.parametrize(
    ("make", "layout"), CASES, ids=lambda value: getattr(value, "__name__", value)
)
@torch.no_grad()
def test_drafts_what_the_equations_say(
    make: Any, layout: str, target: Any, runner: ModelRunner, tmp_path: Path
) -> None:
    case = make(tmp_path, target, layout=layout)
    script = start(case, target, runner, 4)
    generator = torch.Generator().manual_seed(1)
    for gamma in (3, 1, 0, 0, 4, 6, 2):
        accepted = torch.randint(0, gamma + 1, (4,), generator=generator).tolist()
        check_round(script, case, target, gamma, accepted)


@torch.no_grad()
def test_a_parallel_head_reads_a_mask_where_nothing_is_drafted_yet(
    target: Any, runner: ModelRunner, tmp_path: Path
) -> None:
    case = eagle3_case(tmp_path / "chain", target, layout="midlayer")
    tensors = load_file(case.path / "model.safetensors")
    tensors["mask_hidden"] = linear(1, 3 * H, 40)[None]
    layers = {k.replace("midlayer.", "layers.0."): v for k, v in tensors.items()}
    config = {"speculators_model_type": "peagle", "transformer_layer_config": LAYER}
    path = save(tmp_path / "mask", {**config, "mask_token_id": 5}, layers)
    script = start(case._replace(path=path), target, runner, 3)
    assert script.features is not None
    embedding = target.get_input_embeddings().weight.detach()
    masked = case.fuse(tensors["mask_hidden"][0])
    for gamma, accepted in ((3, [3, 0, 1]), (0, [0, 0, 0]), (4, [2, 4, 0]), (1, [0, 1, 0])):
        starts = list(script.lengths)
        draft = script.round(gamma, accepted)
        for row, length in enumerate(starts if draft else []):
            tokens = torch.tensor([*script.sequences[row][1 : length + 1], *[5] * (gamma - 1)])
            known = case.fuse(script.features[row][:length])
            out = case.step(embedding[tokens], torch.cat([known, masked.expand(gamma - 1, -1)]))
            assert draft is not None
            assert draft.tokens[row].tolist() == [case.read(h) for h in out[length - 1 :]]


@torch.no_grad()
def test_backlog_longer_than_the_ring(target: Any, runner: ModelRunner, tmp_path: Path) -> None:
    case = eagle3_case(tmp_path, target, layout="midlayer")
    script = start(case, target, runner, 2)
    check_round(script, case, target, 3, [3, 0])
    for _ in range(45):
        check_round(script, case, target, 0, [0, 0])
    check_round(script, case, target, 6, [2, 6])
    check_round(script, case, target, 2, [0, 0])


@torch.no_grad()
def test_a_row_forgets_the_old_sequence(target: Any, runner: ModelRunner, tmp_path: Path) -> None:
    case = eagle1_case(tmp_path, target, layout="safetensors")
    script = start(case, target, runner, 2)
    check_round(script, case, target, 4, [4, 1])
    script.drafter.release(script.rows)
    script.sequences = random_prompts(2, seed=8, low=40, high=40)
    script.features = [target_features(target, s, (-1,)) for s in script.sequences]
    script.admit([3, 1])
    check_round(script, case, target, 4, [0, 2])
    check_round(script, case, target, 4, [0, 0])


@torch.no_grad()
def test_a_proposal_can_be_repeated(target: Any, runner: ModelRunner, tmp_path: Path) -> None:
    """What it has brought up to date counts from the commit on."""
    script = start(eagle1_case(tmp_path, target, layout="safetensors"), target, runner, 3)
    script.round(3, [2, 0, 3])
    state = script.state()
    first, second = (script.drafter.propose(state, 4).tokens.tolist() for _ in range(2))
    assert first == second


def test_needs_hidden_states(target: Any, runner: ModelRunner, tmp_path: Path) -> None:
    case = eagle1_case(tmp_path, target, layout="safetensors")
    drafter = EagleDrafter(case.path)
    drafter.bind(runner, GreedySampler(VOCAB), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the target's hidden states"):
        drafter.admit(torch.tensor([0]), torch.ones(1, 3).long(), torch.tensor([3]), None)


def test_target_of_another_width_or_depth(tmp_path: Path, target: Any) -> None:
    case = eagle3_case(tmp_path, target, layout="midlayer")
    wide = ModelRunner(tiny_model("llama", hidden_size=64, num_hidden_layers=DEPTH), 1, 64)
    with pytest.raises(ValueError, match="embeddings of width 32, the target's have 64"):
        EagleDrafter(case.path).bind(wide, GreedySampler(VOCAB), 2)  # type: ignore[arg-type]
    shallow = ModelRunner(tiny_model("llama", num_hidden_layers=1), 1, 64)
    with pytest.raises(ValueError, match="of a target with 1 layers"):
        EagleDrafter(case.path).bind(shallow, GreedySampler(VOCAB), 2)  # type: ignore[arg-type]
