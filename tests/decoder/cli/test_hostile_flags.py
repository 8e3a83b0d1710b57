"""Command lines that cannot work: one line that names what is wrong, and nothing is loaded."""

import json

import pytest
from support.hostile.lines import refused

from decoder.cli import setup

HALF = "\udcff"  # what an argument holds whose bytes are no UTF-8

# Arguments of `generate --prompt a`, and what the line names.
FLAGS = [
    (["--frobnicate"], "--frobnicate"),
    (["--batch-sizes", "3"], "--batch-sizes"),
    (["two\nlines"], "two lines"),
    (["\x1b[31mred"], "\\x1b"),
    (["--batch-size"], "--batch-size"),
    (["--batch-size", ""], "--batch-size"),
    (["--batch-size", "0"], "--batch-size"),
    (["--batch-size", "-1"], "--batch-size"),
    (["--batch-size", "1.5"], "--batch-size"),
    (["--batch-size", "1000000000"], "[1, 4096]"),
    (["--batch-size", "9" * 5000], "--batch-size"),
    (["--batch-size", "٣"], "--batch-size"),
    (["--max-length", "x"], "--max-length"),
    (["--threads", "0"], "--threads"),
    (["--threads", "100000"], "--threads: expected an integer in [1, "),
    (["--threads", "10" * 20], "--threads"),
    (["--device", ""], "--device"),
    (["--device", "foo"], "expected cpu, cuda or cuda:N, got 'foo'"),
    (["--device", "mps"], "'mps'"),
    (["--device", "meta"], "'meta'"),
    (["--device", "cpu:1"], "'cpu:1'"),
    (["--device", "cuda:"], "'cuda:'"),
    (["--device", "cuda:-1"], "'cuda:-1'"),
    (["--device", "cuda:9999"], "'cuda:9999'"),
    (["--device", f"cuda{HALF}"], "--device"),
    (["--dtype", "int3"], "int3"),
    (["--attention", "flash"], "flash"),
    (["--color", "red"], "red"),
    (["--verifier", "none"], "--verifier"),
    (["--experts-implementation", HALF], "--experts-implementation"),
    (["--batch-invariant", "--experts-implementation", "eager"], "--batch-invariant is read by"),
    (["--int8-activations", "--experts-implementation", "eager"], "--int8-activations is read by"),
    (["--target", ""], "--target"),
    (["--target", "nowhere"], "nowhere"),
    (["--target", "/no/such/model"], "/no/such/model"),
    (["--target", "./no/model"], "./no/model"),
    (["--target", "a\0b"], "--target"),
    (["--draft", ""], "--draft"),
    (["--draft", "nowhere"], "nowhere"),
    (["--draft", "/no/such/draft"], "/no/such/draft"),
    (["--draft", "/no/such/draft", "--gamma", "0"], "/no/such/draft"),
    (["--draft", "/no/such/draft", "--drafter", "ngram"], "/no/such/draft"),
    (["--draft", "/", "--drafter", "ngram"], "--draft is not read by ngram"),
    (["--draft", "/", "--drafter", "self"], "--draft is not read by self"),
    (["--draft", "/", "--drafter", "none"], "--draft is not read by none"),
    (["--drafter", "psychic"], "psychic"),
    (["--drafter", ""], "--drafter"),
    (["--drafter", "none", "--gamma", "4"], "--gamma 4 is not read by none"),
    (["--drafter", "ngram", "--self-draft-top-k", "2"], "--self-draft-top-k is not read by ngram"),
    (["--drafter", "ngram", "--ngram-threshold", "2"], "--ngram-threshold is not read by ngram"),
    (["--drafter", "none", "--prompt-lookup-max", "2"], "--prompt-lookup-max is not read by none"),
    (["--drafter", "eagle3", "--replay-alpha", "0.5"], "--replay-alpha is not read by eagle"),
    (["--prompt-lookup-max", "2"], "--prompt-lookup-max is not read by independent"),
    (["--drafter", "ngram", "--prompt-lookup-max", "0"], "--prompt-lookup-max"),
    (["--drafter", "ngram", "--prompt-lookup-max", "999999"], "[1, 1024]"),
    (["--drafter", "ngram", "--prompt-lookup-min", "5", "--prompt-lookup-max", "3"], "got 5 and 3"),
    (["--drafter", "suffix", "--prompt-lookup-max", "2"], "max is not read by suffix, which reads"),
    (["--drafter", "ngram", "--suffix-decoding-max-tree-depth", "4"], "depth is not read by ngram"),
    (["--drafter", "suffix", "--suffix-decoding-max-tree-depth", "0"], "an integer >= 1, got '0'"),
    (["--drafter", "suffix", "--suffix-decoding-max-tree-depth", "9999"], "[1, 1024]"),
    (["--drafter", "suffix", "--suffix-decoding-max-cached-requests", "-1"], ">= 0, got '-1'"),
    (["--drafter", "suffix", "--suffix-decoding-max-cached-requests", "1e3"], "got '1e3'"),
    (["--drafter", "suffix", "--suffix-decoding-max-spec-factor", "-1"], "a number in [0, 1024]"),
    (["--drafter", "suffix", "--suffix-decoding-max-spec-factor", "inf"], "got 'inf'"),
    (["--drafter", "suffix", "--suffix-decoding-min-token-prob", "1.1"], "a number in [0, 1]"),
    (["--drafter", "suffix", "--suffix-decoding-min-token-prob", "nan"], "got 'nan'"),
    (["--drafter", "self", "--self-draft-top-k", "0"], "--self-draft-top-k"),
    (["--drafter", "replay", "--replay-alpha", "2"], "--replay-alpha"),
    (["--drafter", "replay", "--replay-alpha", "-0.1"], "--replay-alpha"),
    (["--drafter", "replay", "--replay-alpha", "nan"], "--replay-alpha"),
    (["--drafter", "replay", "--replay-alpha", ""], "--replay-alpha"),
    (["--gamma", "x"], "--gamma"),
    (["--gamma", "-1"], "--gamma"),
    (["--gamma", "1000000"], "[0, 4096]"),
    (["--gamma", "1" + "0" * 30], "--gamma"),
    (["--gamma", "4", "--max-gamma", "8"], "--max-gamma"),
    (["--max-gamma", "0"], "--max-gamma"),
    (["--max-gamma", "1000000"], "--max-gamma"),
    (["--temperature", "-1"], "temperature"),
    (["--temperature", "nan"], "temperature"),
    (["--temperature", "inf"], "temperature"),
    (["--temperature", "1e400"], "temperature"),
    (["--temperature", "warm"], "temperature"),
    (["--top-p", "0"], "top_p"),
    (["--top-p", "1.1"], "top_p"),
    (["--top-k", "-1"], "top_k"),
    (["--top-k", "1.5"], "top-k"),
    (["--min-p", "2"], "min_p"),
    (["--repetition-penalty", "0"], "repetition_penalty"),
    (["--repetition-penalty=-inf"], "repetition_penalty"),
    (["--presence-penalty", "nan"], "presence_penalty"),
    (["--frequency-penalty", "1e400"], "frequency_penalty"),
    (["--max-new-tokens", "0"], "max_new_tokens"),
    (["--max-new-tokens", "-1"], "max_new_tokens"),
    (["--max-new-tokens", "1e3"], "max-new-tokens"),
    (["--min-new-tokens", "-1"], "min_new_tokens"),
    (["--seed", "-1"], "seed"),
    (["--seed", str(2**63)], "seed"),
    (["--seed", "0x10"], "seed"),
    (["--stop", ""], "stop"),
    (["--stop", HALF], "--stop"),
    (["--stop-token-ids", "-1"], "stop_token_ids"),
    (["--stop-token-ids", "a"], "--stop-token-ids"),
    (["--logprobs", "-1"], "logprobs"),
    (["--logprobs", "all"], "--logprobs"),
    (["--logit-bias", "[1]"], "--logit-bias"),
    (["--logit-bias", "1: 2"], "--logit-bias"),
    (["--logit-bias", '{"a": 1}'], "--logit-bias"),
    (["--logit-bias", '{"1": "2"}'], "--logit-bias"),
    (["--logit-bias", '{"1": true}'], "--logit-bias"),
    (["--logit-bias", '{"1": NaN}'], "--logit-bias"),
    (["--logit-bias", '{"1": 1, "1": 2}'], "--logit-bias"),
    (["--logit-bias", '{"1": 1, "+1": 2}'], "every token once"),
    (["--logit-bias", '{"-1": 1}'], "logit_bias"),
    (["--prompt", HALF], "--prompt"),
    (["--chat-template", ""], "--chat-template"),
    (["--chat-template", "/no/such/file.jinja"], "expected a file or a Jinja template, got"),
    (["--chat-template", "chatml"], "expected a file or a Jinja template, got 'chatml'"),
    (["--chat-template", "/"], "expected a file or a Jinja template, got '/'"),
    (["--chat-template", "/dev/zero"], "expected a file or a Jinja template, got '/dev/zero'"),
    (["--chat-template", "a\0b"], "--chat-template"),
    (["--chat-template", "{{ a }}" + HALF], "--chat-template"),
    (["--generation-config", ""], "--generation-config"),
    (["--generation-config", "vllm"], "cannot read vllm: No such file"),
    (["--generation-config", "/"], "cannot read /generation_config.json: No such file"),
    (["--output", ""], "--output"),
    (["--output", "-"], "--output must name a file, got -"),
    (["--output", "/no/folder/out.jsonl"], "/no/folder/out.jsonl"),
    (["--output", "/"], "cannot write to /"),
    (["--resume"], "--resume needs --output"),
    (["--resume", "--output", "/dev/null"], "--resume needs a file"),
    (["--prompts", "a.jsonl"], "exactly one of --prompt and --prompts"),
]

CONFIGS = [
    ("[]", "expected a JSON object, got a list"),
    ("null", "expected a JSON object, got null"),
    ('"ngram"', "expected a JSON object, got text"),
    ("{", "expected a JSON object"),
    ("", "expected a JSON object"),
    ("[" * 5000, "nested too deeply"),
    ('{"k": 1}', "unknown key 'k'"),
    ('{"num_speculative_token": 1}', "did you mean 'num_speculative_tokens'"),
    ('{"num_speculative_tokens": "4"}', "must be an integer, got text"),
    ('{"num_speculative_tokens": true}', "must be an integer, got true"),
    ('{"num_speculative_tokens": 4.5}', "must be an integer, got a number"),
    ('{"num_speculative_tokens": null}', "must be an integer, got null"),
    ('{"num_speculative_tokens": -1}', "--gamma"),
    ('{"num_speculative_tokens": 1, "num_speculative_tokens": 2}', "twice"),
    ('{"method": "psychic"}', "psychic"),
    ('{"method": ["ngram"]}', "must be text, got a list"),
    ('{"method": "ngram", "model": "/"}', "--draft is not read by ngram"),
    ('{"model": "/no/such/draft"}', "/no/such/draft"),
    ('{"model": "\\u0000"}', "--draft"),
    ('{"model": "\\ud800"}', "lone surrogate"),
    ('{"rejection_sample_method": "lenient"}', "lenient"),
    ('{"suffix_decoding_min_token_prob": "0.1"}', "must be a number, got text"),
    ('{"suffix_decoding_min_token_prob": true}', "must be a number, got true"),
    ('{"suffix_decoding_min_token_prob": 2}', "--suffix-decoding-min-token-prob"),
    ('{"suffix_decoding_max_tree_depth": 2.5}', "must be an integer, got a number"),
    ('{"suffix_decoding_max_tree_depth": 2}', "is not read by independent"),
    ('{"prompt_lookup_max": 2}', "--prompt-lookup-max is not read by independent"),
    ('{"quantization": "awq"}', "expected int8 or int4, got 'awq'"),
    ('{"method": "ngram", "quantization": "int8"}', "--draft-dtype is not read by ngram"),
]

PLAN = ["plan", "--machine", "h200", "--target", "olmoe"]
COMMANDS = [
    (["generate"], "exactly one of --prompt and --prompts"),
    (["genrate"], "genrate"),
    (["--debugging"], "--debugging"),
    (["compare", "--repetitions", "0"], "--repetitions"),
    (["compare", "--limit", "0"], "--limit"),
    (["compare", "--limit", "1" + "0" * 30], "--limit"),
    (["compare", "--prompts", "/no/file.jsonl"], "/no/file.jsonl"),
    (["compare", "--prompts", ""], "--prompts"),
    (["compare", "--temperature", "nan"], "temperature"),
    (["compare", "--drafter", "none", "--draft", "/"], "--draft is not read by none"),
    (["audit", "--samples", "1000000000"], "--samples"),
    (["audit", "--samples", "-1"], "--samples"),
    (["audit", "--prompts", "/"], "cannot read prompts from /"),
    (["audit", "--prompts", "/dev/zero"], "expected a file, got a device"),
    (["audit", "--top-p", "7"], "top_p"),
    (["demo", "--repetitions", "x"], "--repetitions"),
    (["demo", "--device", "tpu"], "--device"),
    (["--threads", "100000"], "--threads"),
    ([*PLAN, "--alpha", "1.5"], "alpha"),
    ([*PLAN, "--alpha", "nan"], "alpha"),
    ([*PLAN, "--alpha", "much"], "--alpha"),
    ([*PLAN, "--batch-sizes", "0"], "batch sizes"),
    ([*PLAN, "--batch-sizes", "1000000000"], "batch sizes"),
    ([*PLAN, "--batch-sizes", "1..1000000000"], "batch sizes"),
    ([*PLAN, "--batch-sizes", ""], "expected numbers"),
    ([*PLAN, "--batch-sizes", "1,,2"], "expected numbers"),
    ([*PLAN, "--gammas", "0..1000000"], "4096 values"),
    ([*PLAN, "--gammas", "1000000"], "gammas"),
    ([*PLAN, "--gammas", "-4"], "gammas"),
    ([*PLAN, "--gammas", "0..1000", "--batch-sizes", "1..1024"], "cells"),
    ([*PLAN, "--gammas", "9..1"], "must increase"),
    ([*PLAN, "--context", "0"], "--context"),
    ([*PLAN, "--context", "-5"], "--context"),
    ([*PLAN, "--context", "1" + "0" * 20], "--context"),
    ([*PLAN, "--top-k-experts", "0"], "--top-k-experts"),
    ([*PLAN, "--top-k-experts", "65"], "top_k 65"),
    ([*PLAN, "--launch-us", "0"], "--launch-us"),
    ([*PLAN, "--launch-us", "-1"], "--launch-us"),
    ([*PLAN, "--launch-us", "nan"], "--launch-us"),
    ([*PLAN, "--dtype", "int3"], "int3"),
    ([*PLAN, "--draft", ""], "--draft"),
    ([*PLAN, "--draft", "no-such-model"], "no-such-model"),
    (["plan", "--target", "olmoe", "--machine", "h300"], "h300"),
    (["plan", "--target", "olmoe", "--machine", "0xh200"], "devices"),
    (["plan", "--target", "olmoe", "--machine", "9999999999xh200"], "devices"),
    (["plan", "--target", "olmoe", "--machine", ""], "--machine"),
    (["plan", "--target", "opt-31b", "--machine", "h200"], "opt-31b"),
    (["plan", "--target", "/no/config.json", "--machine", "h200"], "/no/config.json"),
    (["plan", "--machine", "h200"], "--target"),
]


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    def load(*args):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(setup.Setup, "__init__", load)


def test_there_are_as_many_as_the_docstrings_say():
    assert len(FLAGS) >= 100 and len(CONFIGS) >= 20 and len(COMMANDS) >= 45


@pytest.mark.parametrize(("arguments", "named"), FLAGS)
def test_a_flag(arguments, named, tmp_path, capsys):
    refused(
        ["generate", "--target", "embedded", "--prompt", "a", *arguments], named, tmp_path, capsys
    )


@pytest.mark.parametrize(("config", "named"), CONFIGS)
def test_a_speculative_config(config, named, tmp_path, capsys):
    arguments = [
        "generate",
        "--target",
        "embedded",
        "--prompt",
        "a",
        "--speculative-config",
        config,
    ]
    refused(arguments, named, tmp_path, capsys)


@pytest.mark.parametrize(("arguments", "named"), COMMANDS)
def test_a_command(arguments, named, tmp_path, capsys):
    refused(arguments, named, tmp_path, capsys)


def test_a_flag_and_the_config_that_contradicts_it(tmp_path, capsys):
    config = json.dumps({"num_speculative_tokens": 4})
    arguments = [
        "generate",
        "--target",
        "embedded",
        "--prompt",
        "a",
        "--gamma",
        "3",
        "--speculative-config",
        config,
    ]
    refused(arguments, "3 from a flag and 4 from --speculative-config", tmp_path, capsys)
