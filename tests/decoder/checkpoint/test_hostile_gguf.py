"""GGUF files that are damaged, lie, or are of a kind that is not read: one line each."""

from __future__ import annotations

import random
import struct

import pytest
import torch
from support.hostile.folders import refused, whole
from support.hostile.gguf import BOOL, F32, LIST, TEXT, U32, U64, Gguf, Info, text

from decoder import SamplingParams, SpeculativeDecoder
from decoder.__main__ import main
from decoder.model.loading import load_model, load_tokenizer
from moesd_kernels.hooks.loading import GgufFile

HUGE = 2**60
READ = "read are f32, f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k"


def data(content):
    """The whole file is this."""
    return lambda _: content


def header(**changes):
    return lambda file: vars(file).update(changes)


def fields(**changes):
    """Values by names that lack their family's; None takes one out."""

    def change(file):
        for name, value in changes.items():
            known = [key for key in file.fields if key.endswith(name.replace("__", "."))]
            key = known[0] if known else name.replace("__", ".")
            if value is None:
                del file.fields[key]
            else:
                file.fields[key] = value

    return change


def tensor(name, **changes):
    def change(file):
        file.tensors[name] = file.tensors[name]._replace(**changes)

    return change


def renamed(old, new):
    def change(file):
        file.tensors = {name.replace(old, new): info for name, info in file.tensors.items()}

    return change


def removed(name):
    return lambda file: file.tensors.pop(name) and None


def replaced(old, new):
    """The same number of other bytes."""
    assert len(old) == len(new)
    return lambda file: file.bytes().replace(old, new, 1)


Q = "blk.0.attn_q.weight"
FILES = {
    "empty": (data(b""), "is empty"),
    "four bytes": (data(b"GGUF"), "it ends within its header: 4 bytes wanted, 0 there"),
    "a pointer of git-lfs": (data(b"version https://git-lfs.github.com/spec/v1\n"), "lfs pull"),
    "another format": (data(b"PK\3\4" + bytes(64)), r"must start with b'GGUF', got b'PK\x03\x04'"),
    "the first version": (header(version=1), "its version must be 2 or 3, got 1"),
    "a version to come": (header(version=4), "its version must be 2 or 3, got 4"),
    "big-endian": (header(version=3 << 24), "got one of a big-endian machine"),
    "more fields than there are": (header(counts=(None, HUGE)), "cannot be read as GGUF: "),
    "more tensors than there are": (header(counts=(HUGE, None)), "its list of tensors"),
    "as many as there can be": (header(counts=(2**64 - 1, 2**64 - 1)), "cannot be read as GGUF: "),
    "a long text": (
        fields(general__architecture=(TEXT, struct.pack("<Q", HUGE))),
        f"general.architecture has a text of {HUGE} bytes",
    ),
    "text beyond the file": (
        fields(general__architecture=(TEXT, struct.pack("<Q", 2**20))),
        "it ends within its metadata general.architecture: 1048576 bytes wanted",
    ),
    "a long list": (
        fields(tokens=(LIST, struct.pack("<IQ", TEXT, HUGE))),
        f"tokenizer.ggml.tokens is a list of {HUGE} values",
    ),
    "a list beyond the file": (
        fields(tokens=(LIST, struct.pack("<IQ", U64, 2**21))),
        "it ends within its metadata tokenizer.ggml.tokens: 16777216 bytes wanted",
    ),
    "lists of lists": (fields(tokens=(LIST, (LIST, []))), "values of the unknown type 9"),
    "a value of no type": (fields(block_count=(99, b"")), "a value of the unknown type 99"),
    "no UTF-8": (fields(general__architecture=(TEXT, text(b"\xff\xfe"))), "can't decode"),
    "a field without a name": (
        lambda file: file.fields.update({"": (U32, 1)}),
        "its metadata has no name",
    ),
    "a field twice": (
        replaced(b"ggml.tokens", b"ggml.merges"),
        "its metadata has 'tokenizer.ggml.merges' twice",
    ),
    "a tensor twice": (
        replaced(b"attn_k.weight", b"attn_v.weight"),
        "its list of tensors has 'blk.0.attn_v.weight' twice",
    ),
    "an odd alignment": (fields(general__alignment=(U32, 24)), "must be a power of two from 8 on"),
    "alignment as text": (fields(general__alignment=(TEXT, "x")), "must be a power of two"),
    "five dimensions": (tensor(Q, shape=(2, 2, 2, 2, 64)), "1 to 4 dimensions, got 5"),
    "no dimensions": (tensor(Q, shape=()), "1 to 4 dimensions, got 0"),
    "no values": (tensor(Q, shape=(32, 0)), "must have values, got the shape (0, 32)"),
    "a huge tensor": (tensor(Q, shape=(HUGE, HUGE)), f"it ends within {Q}: "),
    "a tensor beyond the file": (tensor("blk.0.ffn_down.weight", start=HUGE), "it ends within blk"),
    "tensors in each other": (tensor(Q, start=32), "must start after token_embd.weight ends"),
    "a crooked start": (tensor(Q, start=33), "must start at a multiple of 32, got 33"),
    "a type of no name": (tensor(Q, kind=777), f"is of the unknown type 777, {READ}"),
    "three bits": (tensor(Q, kind=11), f"{Q} is q3_k, {READ}"),
    "an importance matrix": (tensor(Q, kind=23), f"{Q} is iq4_xs, {READ}"),
    "microscaling": (tensor(Q, kind=39), f"{Q} is mxfp4, {READ}"),
    "a row of half a block": (tensor(Q, shape=(16, 32), kind=8), "a multiple of 32 in q8_0"),
    "one part of several": (fields(split__count=(U32, 3)), "it is one of 3 parts"),
    "another architecture": (
        fields(general__architecture=(TEXT, "falcon")),
        "llama, qwen2, qwen3, qwen2moe, qwen3moe, got 'falcon'",
    ),
    "dense where it is sparse": (fields(general__architecture=(TEXT, "qwen3moe")), "'qwen3moe'"),
    "no architecture": (fields(general__architecture=None), "has no general.architecture"),
    "architecture as a number": (fields(general__architecture=(U32, 3)), "must be str, got int"),
    "no sizes": (fields(embedding_length=None), "has no llama.embedding_length"),
    "a size as text": (fields(embedding_length=(TEXT, "32")), "must be int, got str"),
    "a size as a truth": (fields(block_count=(BOOL, True)), "must be int, got bool"),
    "a size of zero": (fields(head_count_kv=(U32, 0)), "must be in [1, 524288], got 0"),
    "a huge size": (fields(feed_forward_length=(U64, HUGE)), "must be in [1, 524288], got"),
    "a wide model": (fields(embedding_length=(U32, 2**19)), "as its metadata says"),
    "a million layers": (fields(block_count=(U32, 10**5)), "11 tensors, too few for 100000"),
    "heads that do not divide": (fields(head_count_kv=(U32, 3)), "a multiple of head_count_kv"),
    "an odd head": (fields(dimension_count=(U32, 15)), "an even size, got 15"),
    "half a head turned": (fields(llama__attention__key_length=(U32, 32)), "whole heads of 32"),
    "longer contexts": (fields(llama__rope__scaling__type=(TEXT, "yarn")), "the scaling 'yarn'"),
    **{
        f"longer contexts by {name} alone": (
            fields(**{f"llama__rope__{name}": (F32, factor)}),
            "the scaling 'linear'",
        )
        for name, factor in (("scaling__factor", 4.0), ("scale_linear", 0.5))
    },
    "no number of longer contexts": (
        fields(llama__rope__scaling__factor=(F32, float("nan"))),
        "the scaling 'linear'",
    ),
    "sharper attention": (
        fields(llama__rope__scaling__attn_factor=(F32, 1.25)),
        "must not be scaled, got the factor 1.25",
    ),
    "undefined numbers": (fields(freq_base=(F32, float("nan"))), "must be positive, got nan"),
    "undefined norms": (fields(epsilon=(F32, float("inf"))), "must be a small number, got inf"),
    "experts as text": (fields(llama__expert_count=(TEXT, "8")), "must be int, got str"),
    "no embedding": (removed("token_embd.weight"), "has no token_embd.weight"),
    "a tensor missing": (renamed("ffn_up", "ffn_gap"), "has no blk.0.ffn_up.weight"),
    "a tensor too many": (
        lambda file: file.tensors.update({"a.weight": Info((8,), 0, 2**20)}),
        "it ends within a.weight",
    ),
    "another's tensor": (
        lambda file: file.tensors.update({"a.weight": file.tensors.pop("output_norm.weight")}),
        "has no output_norm.weight",
    ),
    "another shape": (tensor(Q, shape=(16, 64)), f"{Q} must be (32, 32) as its metadata says"),
    "fewer values": (tensor(Q, shape=(32, 16)), f"{Q} must be (32, 32) as its metadata says"),
}
TOKENIZERS = {
    "none": (fields(ggml__model=(TEXT, "none")), "has no tokenizer"),
    "of no kind": (fields(ggml__model=(TEXT, "rwkv")), "that are read are gpt2, llama, got 'rwkv'"),
    "split in no way": (fields(ggml__pre=None), "has no tokenizer.ggml.pre"),
    "split in another": (fields(ggml__pre=(TEXT, "bloom")), "got 'bloom'"),
    "no tokens": (fields(tokens=(LIST, (TEXT, []))), "must differ, got 0"),
    "a token twice": (fields(tokens=(LIST, (TEXT, ["a", "a"]))), "must differ, got 2"),
    "tokens of numbers": (fields(tokens=(LIST, (U32, [1, 2]))), "must hold str, got int"),
    "tokens of text": (fields(tokens=(TEXT, "abc")), "must be list, got str"),
    "fewer types": (fields(token_type=(LIST, (5, [1]))), "8 tokens, and types of 1"),
    "merges of three": (fields(merges=(LIST, (TEXT, ["a b c"]))), "must be pairs"),
    "merges of no tokens": (fields(merges=(LIST, (TEXT, ["x y"]))), "cannot load tokenizer"),
    "an end beyond": (fields(eos_token_id=(U32, 8)), "must be below 8, got 8"),
    "an end as text": (fields(eos_token_id=(TEXT, "</s>")), "must be int, got str"),
    "no scores": (fields(ggml__model=(TEXT, "llama")), "has no tokenizer.ggml.scores"),
}


def written(path, change):
    file = Gguf()
    content = change(file)
    path.write_bytes(file.bytes() if content is None else content)
    return path


@pytest.mark.parametrize(("change", "said"), FILES.values(), ids=FILES)
def test_a_file_is_one_or_refused(change, said, tmp_path, monkeypatch):
    file = written(tmp_path / "m.gguf", change)
    with refused(tmp_path, said, monkeypatch):
        load_model(file, device="cpu")


@pytest.mark.parametrize(("change", "said"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_is_one_or_refused(change, said, tmp_path, monkeypatch):
    file = written(tmp_path / "m.gguf", change)
    with refused(tmp_path, said, monkeypatch):
        load_tokenizer(file)


def test_the_whole_file_is_read(tmp_path):
    file = written(tmp_path / "m.gguf", lambda _: None)
    model = load_model(file, device="cpu")
    assert model.config.eos_token_id == 0
    assert torch.equal(model.model.norm.weight, torch.ones(32, dtype=torch.bfloat16))
    assert load_tokenizer(file).encode("abc") == [3, 4]


def test_the_only_part_is_the_whole_file(tmp_path):
    """``llama-gguf-split`` makes one part of a model that fits, NAME-00001-of-00001.gguf."""
    file = written(tmp_path / "m.gguf", fields(split__count=(U32, 1), split__no=(U32, 0)))
    assert load_model(file, device="cpu").config.vocab_size == 8


@pytest.mark.parametrize(
    "unscaled",
    [
        {"scaling__factor": (F32, 1.0), "scaling__attn_factor": (F32, 1.0)},
        {"scaling__factor": (F32, 0.0), "scale_linear": (F32, 4.0)},  # the newer name holds
        {"scale_linear": (F32, 0.0)},
        {"scaling__type": (TEXT, "none"), "scaling__factor": (F32, 4.0)},
    ],
    ids=str,
)
def test_a_scale_that_changes_nothing_is_read(unscaled, tmp_path):
    change = fields(**{f"llama__rope__{name}": value for name, value in unscaled.items()})
    model = load_model(written(tmp_path / "m.gguf", change), device="cpu")
    assert model.config.rope_parameters["rope_type"] == "default"


def test_a_file_that_is_cut_off_anywhere_is_said_to_be(tmp_path):
    path, whole_file = tmp_path / "m.gguf", Gguf()
    content, ends = whole_file.bytes(), len(whole_file.header())
    for cut in [*range(1, ends, 7), *range(ends, len(content), 997), len(content) - 1]:
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"m\.gguf cannot be read as GGUF: it (ends|must)"):
            GgufFile(path)


def test_a_wrong_byte_is_refused_or_read(tmp_path):
    """Nothing else: no other exception, and no memory for what is not there."""
    path, whole_file = tmp_path / "m.gguf", Gguf()
    content, ends = whole_file.bytes(), len(whole_file.header())
    drawn = random.Random(0)
    refusals = 0
    for _ in range(400):
        broken = bytearray(content)
        broken[drawn.randrange(ends)] = drawn.choice((0, 1, 0x7F, 0x80, 0xFF, drawn.randrange(256)))
        path.write_bytes(broken)
        try:
            GgufFile(path)
        except ValueError as error:
            assert str(path) in str(error)
            refusals += 1
    assert refusals > 80


def test_what_is_no_file_is_said(tmp_path, monkeypatch):
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "loop.gguf").symlink_to(tmp_path / "loop.gguf")
    named = {"folder": "is an empty folder", "loop": "does not exist", "none": "does not exist"}
    for name, said in named.items():
        with refused(tmp_path, said, monkeypatch):
            load_model(tmp_path / f"{name}.gguf", device="cpu")


@pytest.mark.parametrize("flag", ["--target", "--draft"])
def test_the_command_line_says_it_in_one_line(flag, tmp_path, capsys):
    file = written(tmp_path / "m.gguf", FILES["three bits"][0])
    target = [] if flag == "--target" else ["--target", str(whole(tmp_path / "model"))]
    flags = [*target, flag, str(file), "--prompt", "w1", "--device", "cpu"]
    capsys.readouterr()  # a bar, where saving the target is the first thing that a process does
    assert main(["generate", *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("moesd: error: ") and f"{Q} is q3_k" in printed.err
    assert printed.err.count("\n") == 1 and str(file) in printed.err


def test_a_draft_without_tokens_is_told_by_its_size(tmp_path):
    target = written(tmp_path / "target.gguf", lambda _: None)
    draft = written(tmp_path / "draft.gguf", TOKENIZERS["none"][0])
    decoder = SpeculativeDecoder.from_paths(target, draft, gamma=2, device="cpu")
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    assert len(decoder.generate(["ab"], params)[0].token_ids) == 4
