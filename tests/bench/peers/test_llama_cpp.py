"""llama.cpp's program, stood in for by a script: what it is asked, what counts, what is refused."""

from __future__ import annotations

import json
import sys

import pytest

from bench.__main__ import main
from bench.gguf.contents import contents_of
from bench.gguf.writer import write_gguf
from bench.measure.record import read_lines
from bench.peers.llama_cpp import LlamaCpp
from decoder import embedded
from decoder.model.loading import load_model

PROGRAM = f"""#!{sys.executable}
import json, os, sys
if sys.argv[1:] == ["--version"]:
    print("warming up\\nversion: 1.2 (commit abc)\\nbuilt with gcc", file=sys.stderr)
    sys.exit()
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
flags["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
json.dump(flags, open("FOLDER/asked.json", "w"))
print("loading a model")
for number, batch in enumerate(flags["-npl"].split(",")):
    line = {{"pp": "-npp", "tg": "-ntg", "n_threads": "-t", "n_threads_batch": "-tb"}}
    line = {{key: int(flags[flag]) for key, flag in line.items()}} | {{"pl": int(batch)}}
    print(json.dumps(line | {{"t_pp": 1.0 - 0.75 * number, "t_tg": 3.0 - number}}))
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with the program and ``m.gguf``, which is no model."""
    return with_program(tmp_path, PROGRAM)


def with_program(folder, text):
    program = folder / "llama-batched-bench"
    program.write_text(text.replace("FOLDER", str(folder)))
    program.chmod(0o755)
    (folder / "m.gguf").touch()
    return folder


def test_the_second_pass_counts(folder):
    peer = LlamaCpp(folder, folder / "m.gguf", threads=3)
    assert peer.version == "1.2 (commit abc)"
    # The first new token comes with the prompt, so 299 of 300 are steps.
    assert peer.run([[1] * 20, [1] * 31, [1] * 30], 300) == (2.25, [])
    asked = json.loads((folder / "asked.json").read_text())
    assert (asked["-npp"], asked["-ntg"], asked["-npl"]) == ("27", "299", "3,3")
    assert (asked["-t"], asked["-tb"], asked["OMP_NUM_THREADS"]) == ("3", "3", "3")
    assert int(asked["-c"]) == 3 * 512 and asked["-m"] == str(folder / "m.gguf")
    with pytest.raises(ValueError, match="at least 2 new tokens, got 1"):
        peer.run([[1]], 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ('"-tb"}', '"-t"}; flags["-t"] = 9'),
            "must print .*'n_threads': 3.* got .*'n_threads': 9",
        ),
        (('flags["-npl"].split(",")', "[3]"), "must print .* twice, got"),
        (('print("loading a model")', 'sys.exit("no such model")'), "exit code 1: no such model"),
    ],
)
def test_a_run_that_is_not_the_one_asked_for_does_not_count(tmp_path, change, message):
    folder = with_program(tmp_path, PROGRAM.replace(*change))
    peer = LlamaCpp(folder, folder / "m.gguf", threads=3)
    with pytest.raises(RuntimeError, match=message):
        peer.run([[1] * 20] * 3, 30)


def test_what_is_not_there_or_names_no_version_is_said(folder):
    with pytest.raises(FileNotFoundError, match=r"needs .*other\.gguf, which is not there"):
        LlamaCpp(folder, folder / "other.gguf", threads=1)
    with pytest.raises(FileNotFoundError, match=r"needs .*llama-batched-bench, which is not there"):
        LlamaCpp(folder / "none", folder / "m.gguf", threads=1)
    with_program(folder, "#!/bin/sh\necho hello\n")
    with pytest.raises(RuntimeError, match="must name its version, got 'hello'"):
        LlamaCpp(folder, folder / "m.gguf", threads=1)


def test_ours_at_several_gammas_beside_it_in_one_run(folder, capsys):
    pytest.importorskip("gguf")
    write_gguf(load_model(embedded.target_path(), device="cpu"), folder / "m.gguf")
    out = folder / "lines.jsonl"
    flags = ["--preset=embedded", "--batch-sizes=2", "--new-tokens=6", "--rounds=1", "--gamma=1,2"]
    flags += [f"--prompts={folder / 'prompts.jsonl'}", "--device=cpu", f"--out={out}"]
    flags += [
        "--weight-format=int8",
        "--drafter=ngram",
        "--no-transformers",
        f"--llama-cpp={folder}",
    ]
    texts = [json.dumps({"prompt": "def add(a, b):" * n}) for n in (1, 2)]
    (folder / "prompts.jsonl").write_text("\n".join(texts))
    assert main(["generate", *flags]) == 2
    assert "GGUF file, which must be given" in capsys.readouterr().err
    assert main(["generate", *flags, f"--gguf={folder / 'm.gguf'}"]) == 0
    lines = {line["variant"]: line for line in read_lines([out], "generate")}
    gammas = {"ours": None, "llama.cpp": None}
    gammas |= {f"ours speculative, γ = {gamma}": gamma for gamma in "12"}
    assert {name: line["gamma"] for name, line in lines.items()} == gammas
    theirs, ours = lines["llama.cpp"], lines["ours"]
    assert theirs["identical_to_ours"] is None and ours["identical_to_ours"] == 2
    assert theirs["tokens_per_s"]["median"] == pytest.approx(2 * 6 / 2.25)
    assert theirs["llama_cpp"] == "1.2 (commit abc)" and theirs["gguf"]["file"] == "m.gguf"
    assert "gguf" not in ours and theirs["weight_format"] == "plain"
    assert {line["weight_format"] for name, line in lines.items() if "ours" in name} == {"int8"}
    asked = json.loads((folder / "asked.json").read_text())
    assert asked["-npp"] == str(ours["prompt_tokens"]) and asked["-ntg"] == "5"
    assert "llama.cpp" in capsys.readouterr().out


def test_our_inputs_of_eight_bits_are_said_in_our_lines_alone(folder, capsys):
    pytest.importorskip("gguf")
    out = folder / "lines.jsonl"
    flags = ["--preset=embedded", "--drafter=ngram", "--batch-sizes=1", "--new-tokens=4"]
    flags += ["--rounds=1", "--gamma=1", "--no-transformers", "--device=cpu", f"--out={out}"]
    flags += [f"--llama-cpp={folder}", f"--gguf={folder / 'm.gguf'}", "--int8-activations"]
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "def add(a, b):"}))
    flags.append(f"--prompts={folder / 'prompts.jsonl'}")
    write_gguf(load_model(embedded.target_path(), device="cpu"), folder / "m.gguf")
    assert main(["generate", *flags]) == 2
    assert "activations stay as they are" in capsys.readouterr().err  # those of plain weights
    assert main(["generate", *flags, "--weight-format=int8"]) == 0
    rounding = {line["variant"]: "int8_activations" in line for line in read_lines([out])}
    assert rounding == {"ours": True, "ours speculative": True, "llama.cpp": False}


def test_a_file_is_named_after_what_most_of_its_experts_are(tmp_path):
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    writer.add_tensor("token_embd.weight", np.zeros((512, 64), np.float32))
    writer.add_tensor("blk.0.ffn_up_exps.weight", np.zeros((4, 8, 36), np.uint8), raw_dtype=q4_0)
    writer.add_tensor("blk.0.ffn_down_exps.weight", np.zeros((2, 8, 64), np.float32))
    for step in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{step}")()
    writer.close()
    contents = contents_of(tmp_path / "m.gguf")
    assert (contents.file, contents.weight_format) == ("m.gguf", "q4_0")
    assert contents.bytes == (tmp_path / "m.gguf").stat().st_size
