"""Weights that do not fit, are no safetensors, or are broken: one line that says so."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from support.hostile.folders import (
    WEIGHTS,
    copied,
    edited,
    header,
    refused,
    removed,
    renamed,
    tensors,
    together,
    whole,
    without,
    written,
)

from decoder.model.loading import load_model

INDEX = "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


class Bomb:
    """Leaves the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def bomb(name):
    def change(folder):
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps(Bomb(folder.parent / "ran")))

    return change


def sharded(**names):
    """Moves the weights into one shard, which an index names as told."""

    def change(folder):
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        weight_map = {"lm_head.weight": "a.safetensors"} | names
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return change


def cut(count):
    def change(folder):
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[:count])

    return change


def outside(folder):
    """The weights lie elsewhere and are linked to."""
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere.safetensors")


def entry(**changes):
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


MISFITS = {
    "all names wrong": (renamed("model.", "modl."), "missing: model"),
    "no head": (without("lm_head"), "missing: lm_head.weight"),
    "a layer missing": (without("layers.1."), "missing: model.layers.1"),
    "a norm missing": (without("model.norm"), "missing: model.norm.weight"),
    "an expert's part missing": (without(EXPERT), "model.layers.1.mlp.experts"),
    "an expert missing": (without("layers.1.mlp.experts.3."), "model.layers.1.mlp.experts"),
    "a layer too many": (
        tensors(lambda t: t | {"model.layers.2.mlp.gate.weight": torch.ones(8, 32)}),
        "left over: model.layers.2.mlp.gate.weight",
    ),
    "another's head": (
        tensors(lambda t: t | {"score.weight": torch.ones(2, 32)}),
        "left over: score.weight",
    ),
    "another vocabulary": (
        tensors(lambda t: t | {"lm_head.weight": torch.ones(63, 32)}),
        "of another shape: lm_head.weight (63, 32) for (64, 32)",
    ),
    "another width": (edited("config.json", hidden_size=40), "of another shape"),
    "an expert of another shape": (tensors(lambda t: t | {EXPERT: torch.ones(7, 32)}), "experts"),
    "an expert without end": (
        tensors(lambda t: t | {EXPERT.replace(".3.", ".99999999999."): torch.ones(16, 32)}),
        "missing: model.layers.1.mlp.experts.",
    ),
    "no tensors": (tensors(lambda held: {"x": torch.ones(1)}), "missing"),
    "integers for weights": (
        tensors(lambda t: {n: (100 * w).to(torch.int8) for n, w in t.items()}),
        "is I8, expected one of",
    ),
}
BROKEN = {
    "empty": (written(WEIGHTS, b""), "is empty"),
    "seven bytes": (cut(7), "cannot read"),
    "cut in the header": (cut(100), "cannot read"),
    "cut in the data": (cut(-10), "cannot read"),
    "text": (written(WEIGHTS, "hello, this is not a file of weights"), "cannot read"),
    "zeros": (written(WEIGHTS, bytes(1000)), "cannot read"),
    "a pointer of git-lfs": (written(WEIGHTS, POINTER), "git lfs pull"),
    "a header without end": (written(WEIGHTS, header(b"{}", length=2**62)), "cannot read"),
    "a header that is no JSON": (written(WEIGHTS, header(b"{nope")), "cannot read"),
    "a header that is a list": (written(WEIGHTS, header(b"[1, 2]")), "cannot read"),
    "a header not UTF-8": (written(WEIGHTS, header(b"\xff\xfe")), "cannot read"),
    "a deep header": (written(WEIGHTS, header(b"[" * 10**5)), "cannot read"),
    "offsets beyond the file": (written(WEIGHTS, header(entry())), "cannot read"),
    "offsets that run backwards": (
        written(WEIGHTS, header(entry(data_offsets=[8, 0]), bytes(8))),
        "cannot read",
    ),
    "a shape that is not the data's": (
        written(WEIGHTS, header(entry(shape=[2**40]), bytes(8))),
        "cannot read",
    ),
    "a shape that overflows": (
        written(WEIGHTS, header(entry(shape=[2**62, 2**62]), bytes(8))),
        "cannot read",
    ),
    "an unknown type": (written(WEIGHTS, header(entry(dtype="F1"), bytes(8))), "cannot read"),
    "overlapping tensors": (
        written(WEIGHTS, header(entry() | {"v": entry()["w"]}, bytes(8))),
        "cannot read",
    ),
    "a folder": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), "model.safetensors"),
    "a pipe": (lambda f: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)), "neither a file nor"),
}
ELSEWHERE = {
    "a link out": (outside, "is a link out of its folder"),
    "a link to nowhere": (lambda f: (f / "x.json").symlink_to("/no/such/file"), "link out"),
    "an index that leads up": (sharded(a="../a.safetensors"), "lies outside its folder"),
    "an index with a whole path": (sharded(a="/tmp/a.safetensors"), "lies outside its folder"),
    "an index that names a pickle": (sharded(a="a.bin"), "expected safetensors files"),
    "a missing shard": (sharded(a="b.safetensors"), "'b.safetensors', which is missing"),
    "an index of numbers": (sharded(a=7), "expected safetensors files"),
    "an index without a map": (
        together(removed(WEIGHTS), written(INDEX, "{}")),
        "must have a weight_map",
    ),
    "an index that is a list": (together(removed(WEIGHTS), written(INDEX, "[]")), "JSON object"),
    "a pickle": (bomb("pytorch_model.bin"), "can run code and are not read"),
    "a pickle by another name": (bomb("model.ckpt"), "can run code and are not read"),
    "a pickle of an adapter": (
        together(
            bomb("adapter_model.bin"),
            edited("config.json", transformers_weights="adapter_model.bin"),
        ),
        "adapter_model.bin",
    ),
    "an adapter": (
        written("adapter_config.json", '{"base_model_name_or_path": "owner/name"}'),
        "holds an adapter",
    ),
    "a distributed checkpoint": (
        together(written("shard-00001-model-00001-of-00001.safetensors", b""), bomb(".metadata")),
        "distributed checkpoint",
    ),
    "GGUF": (
        together(removed(WEIGHTS), written("m.gguf", b"GGUF")),
        "a GGUF file is given by its own path",
    ),
    "GGUF alone": (
        together(removed(WEIGHTS, "config.json"), written("m.gguf", b"GGUF")),
        "a GGUF file is given by its own path",
    ),
    "ONNX": (together(removed(WEIGHTS), written("model.onnx", b"x")), "ONNX is not supported"),
    "TensorFlow": (together(removed(WEIGHTS), written("tf_model.h5", b"x")), "TensorFlow is not"),
    "Flax": (together(removed(WEIGHTS), written("flax_model.msgpack", b"x")), "Flax is not"),
    "no weights": (removed(WEIGHTS), "has neither model.safetensors nor"),
}
CASES = MISFITS | BROKEN | ELSEWHERE


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return whole(tmp_path_factory.mktemp("whole") / "model")


@pytest.mark.parametrize(("change", "said"), CASES.values(), ids=CASES)
def test_weights_are_those_of_the_model_or_refused(change, said, model, tmp_path, monkeypatch):
    folder = copied(model, tmp_path / "model")
    change(folder)
    with refused(folder, said, monkeypatch):
        load_model(folder, device="cpu")
