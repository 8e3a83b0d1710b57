"""Sampling parameters of the wrong type or out of range: the same line for a file and a flag."""

import json

import pytest
import torch
from support.hostile.lines import refused
from support.tiny import save_tokenizer, tiny_moe

from decoder.__main__ import main

# Of a prompt line, and what the message says.
VALUES = [
    ("temperature", True, "temperature must be a finite number, got True"),
    ("temperature", "1", "temperature must be a finite number, got '1'"),
    ("temperature", {}, "temperature must be a finite number, got {}"),
    ("temperature", 1e-40, "temperature must be 0 or a number in"),
    ("temperature", 1e38, "temperature must be 0 or a number in"),
    ("temperature", 10**400, "temperature must be a finite number"),
    ("top_p", False, "top_p must be a finite number, got False"),
    ("top_k", 1.5, "top_k must be an integer, got 1.5"),
    ("top_k", [3], "top_k must be an integer, got [3]"),
    ("min_p", "0", "min_p must be a finite number, got '0'"),
    ("repetition_penalty", 1e38, "repetition_penalty must be a number in"),
    ("repetition_penalty", 1e-38, "repetition_penalty must be a number in"),
    ("presence_penalty", 1e38, "presence_penalty must be a number in"),
    ("frequency_penalty", -1e38, "frequency_penalty must be a number in"),
    ("frequency_penalty", True, "frequency_penalty must be a finite number, got True"),
    ("max_new_tokens", True, "max_new_tokens must be an integer, got True"),
    ("max_new_tokens", "8", "max_new_tokens must be an integer, got '8'"),
    ("max_new_tokens", 8.5, "max_new_tokens must be an integer, got 8.5"),
    ("min_new_tokens", False, "min_new_tokens must be an integer, got False"),
    ("seed", "0", "seed must be an integer, got '0'"),
    ("seed", True, "seed must be an integer, got True"),
    ("stop", {"a": 1}, "stop must be a list of strings, got {'a': 1}"),
    ("stop", 7, "stop must be a list of strings, got 7"),
    ("stop", ["a", 1], "stop must be a list of strings"),
    ("stop", [["a"]], "stop must be a list of strings"),
    ("stop", True, "stop must be a list of strings, got True"),
    ("stop_token_ids", {"1": 1}, "stop_token_ids must be a list of integers"),
    ("stop_token_ids", "12", "stop_token_ids must be a list of integers, got '12'"),
    ("stop_token_ids", [1.5], "stop_token_ids must be a list of integers"),
    ("ignore_eos", "false", "ignore_eos must be true or false, got 'false'"),
    ("ignore_eos", 1, "ignore_eos must be true or false, got 1"),
    ("ignore_eos", [], "ignore_eos must be true or false, got []"),
    ("logprobs", True, "logprobs must be an integer, got True"),
    ("logprobs", "all", "logprobs must be an integer, got 'all'"),
    ("logit_bias", [1, 2], "logit_bias must be token ids to numbers"),
    ("logit_bias", "x", "logit_bias must be token ids to numbers"),
    ("logit_bias", {"a": 1}, "logit_bias must be token ids to numbers"),
    ("logit_bias", {"1": "2"}, "logit_bias must be token ids to numbers"),
    ("logit_bias", {"1": True}, "logit_bias must be token ids to numbers"),
    ("logit_bias", {"1": None}, "logit_bias must be token ids to numbers"),
    ("logit_bias", {"5": 1, "05": 2}, "each id once, got {'5': 1, '05': 2}"),
    ("logit_bias", {"1": 1e38}, "logit_bias must be token id >= 0 to a number"),
]

# Flags that only a loaded model of 97 tokens and a context of 256 can refuse.
FLAGS = [
    (["--logprobs", "99999"], "logprobs must be at most the vocabulary's 97, got 99999"),
    (["--logit-bias", '{"97": 1}'], "logit_bias ids must be in [0, 97), got 97"),
    (["--max-length", "1"], "max_length must be in [2, 256]"),
    (["--max-length", "1" + "0" * 30], "max_length must be in [2, 256]"),
]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "target"
    tiny_moe(seed=1, layers=1, dtype=torch.float32).save_pretrained(path)
    save_tokenizer(path, [f"w{i}" for i in range(97)])
    return str(path)


def test_there_are_as_many_as_the_docstrings_say():
    assert len(VALUES) >= 40


@pytest.mark.parametrize(("name", "value", "message"), VALUES)
def test_a_parameter_of_a_line(name, value, message, tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "a", name: value}) + "\n")
    said = refused(["generate", "--prompts", str(path)], message, tmp_path, capsys)
    assert said.startswith(f"moesd: error: {path}:1: {name} ")


@pytest.mark.parametrize(("arguments", "message"), FLAGS)
def test_a_flag_that_the_model_refuses(target, arguments, message, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    out.write_text('{"index": 0, "finish_reason": "eos"}\n')
    command = ["generate", "--target", target, "--drafter", "none", "--prompt", "w1"]
    refused([*command, "--output", str(out), *arguments], message, tmp_path, capsys)


def test_lines_that_the_model_refuses_cost_themselves_only(target, tmp_path, capsys):
    lines = [{"token_ids": [7, i % 90]} for i in range(30)]
    bad = {
        4: {"token_ids": [7] * 300},
        11: {"token_ids": [97]},
        12: {"prompt": ""},
        20: {"prompt": "w1", "logprobs": 98},
        29: {"prompt": "w1", "logit_bias": {"97": 1}},
    }
    for index, line in bad.items():
        lines[index] = line
    path, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["generate", "--target", target, "--drafter", "none", "--max-new-tokens", "3",
               "--threads", "1", "--prompts", str(path), "--output", str(out)]  # fmt: skip
    assert main(command) == 1
    found = {}
    for line in out.read_text().splitlines():
        record = json.loads(line)
        assert found.setdefault(record["index"], record) is record
    assert sorted(found) == list(range(30))
    assert {index for index, record in found.items() if "error" in record} == set(bad)
    assert "300 tokens leave no room in a context of 256" in found[4]["error"]
    assert capsys.readouterr().err.splitlines()[-1].startswith("moesd: 5 of 30 prompts failed; ")
    before = out.read_bytes()
    assert main([*command, "--resume"]) == 0
    assert out.read_bytes() == before
