"""The command line end to end on a tiny model on disk: results, aliases, and one-line errors."""

import io
import json
import os
import sys
import threading
import time

import pytest
import torch
from support.tiny import save_tokenizer, tiny_moe

from decoder import embedded
from decoder.__main__ import main
from decoder.cli import generate as generate_command
from decoder.cli.arguments import parse
from decoder.cli.compare import load_prompts
from decoder.cli.options import OneLineParser, add_model_arguments, draft_options
from decoder.drafters import DRAFTERS, DraftOptions
from decoder.errors import UserError
from decoder.model.kernels import ATTENTION
from decoder.model.loading import DTYPES
from decoder.sampling import VERIFIERS

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, layers, first in (("target", 2, "w"), ("draft", 1, "w"), ("foreign", 1, "v")):
        tiny_moe(seed=layers, layers=layers, dtype=torch.float32).save_pretrained(root / name)
        save_tokenizer(root / name, [f"{first}{i}" for i in range(97)])
    return root


def prompt_file(path, count=5):
    lines = [{"token_ids": [7 + i, 9, 11], "max_new_tokens": 4 + i} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def run(models, *arguments, command="generate"):
    return main([command, "--model", str(models / "target"), "--threads", "1", *arguments])


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_generate_writes_lines_and_resumes(models, tmp_path, capsys):
    prompts, out = prompt_file(tmp_path / "p.jsonl"), tmp_path / "out.jsonl"
    arguments = ("--prompts", prompts, "--output", str(out), "--ignore-eos", "--drafter", "ngram")
    assert run(models, *arguments) == 0
    first = {r["index"]: r for r in records(out)}
    assert {i: len(r["token_ids"]) for i, r in first.items()} == {i: 4 + i for i in range(5)}
    out.write_text("".join(json.dumps(first[i]) + "\n" for i in (0, 3)) + '{"ind')
    assert run(models, *arguments, "--resume") == 0
    again = {r["index"]: r for r in records(out)}
    assert again.keys() == first.keys()
    assert all(again[i]["token_ids"] == first[i]["token_ids"] for i in first)
    assert "3 sequences" in capsys.readouterr().err
    whole = out.read_bytes()
    # Nothing is loaded: there need not even be a model.
    assert main(["generate", "--model", "no/model", *arguments, "--resume"]) == 0
    said = capsys.readouterr().err
    assert said == f"nothing left: every prompt has a result in {out}\n"
    assert out.read_bytes() == whole


def test_an_interrupted_run_keeps_what_finished(models, tmp_path, monkeypatch):
    prompts, out = prompt_file(tmp_path / "p.jsonl"), tmp_path / "out.jsonl"
    original = generate_command._with_progress

    def interrupted(outputs, total, decoder):
        for count, output in enumerate(original(outputs, total, decoder)):
            if count == 2:
                raise KeyboardInterrupt
            yield output

    monkeypatch.setattr(generate_command, "_with_progress", interrupted)
    assert run(models, "--prompts", prompts, "-o", str(out), "--drafter", "none") == 130
    assert len(records(out)) == 2


def test_text_output_and_aliases(models, capsys):
    arguments = ("--prompt", "w7 w8", "--max-tokens", "5", "--num-speculative-tokens", "2",
                 "--assistant-model", str(models / "draft"), "--max-num-seqs", "1",
                 "--batch-invariant", "--color", "always")  # fmt: skip
    assert run(models, *arguments) == 0
    shown = capsys.readouterr().out
    assert "w7 w8" in shown
    assert "\x1b[" in shown


@pytest.mark.parametrize("drafter", ["self", "replay"])
def test_compare_reports_identical_outputs(models, tmp_path, capsys, drafter):
    prompts = prompt_file(tmp_path / "p.jsonl", 3)
    arguments = ("--prompts", prompts, "--drafter", drafter, "--gamma", "2", "--batch-size", "3",
                 "--repetitions", "1", "--json")  # fmt: skip
    assert run(models, *arguments, command="compare") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["identical"] == result["sequences"] == 3
    assert result["ratio"] > 0
    assert run(models, *arguments[:-1], command="compare") == 0
    assert "yes (3/3)" in capsys.readouterr().out


def test_speculative_config_sets_flags(tmp_path):
    parser = OneLineParser(prog="t")
    add_model_arguments(parser)
    text = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}'
    args = parse(parser, ["--speculative-config", text])
    assert (args.drafter, args.gamma, args.max_ngram) == ("ngram", 4, 3)
    text = json.dumps({"method": "draft_model", "model": str(tmp_path), "quantization": "int4"})
    args = parse(parser, ["--speculative-config", text])
    assert (args.drafter, args.draft, args.weight_format) == ("draft_model", str(tmp_path), "int4")
    text = """{
        "method": "suffix", "num_speculative_tokens": 8, "suffix_decoding_max_tree_depth": 32,
        "suffix_decoding_max_cached_requests": 100, "suffix_decoding_max_spec_factor": 2,
        "suffix_decoding_min_token_prob": 0.2
    }"""
    args = parse(parser, ["--speculative-config", text])
    assert (args.drafter, args.gamma, args.max_tree_depth) == ("suffix", 8, 32)
    told = (args.max_cached_requests, args.max_spec_factor, args.min_token_prob)
    assert told == (100, 2.0, 0.2)
    config = json.dumps({"model": str(tmp_path)})
    args = parse(parser, ["--batch-size", "3", "--speculative-config", config])
    assert (args.draft, args.batch_size, args.drafter) == (str(tmp_path), 3, "auto")


@pytest.mark.parametrize(
    ("flags", "config"),
    [
        (["--verifier", "block"], {"rejection_sample_method": "standard"}),
        (["--drafter", "ngram"], {"method": "auto"}),
        (["--gamma", "3"], {"num_speculative_tokens": 4}),
    ],
)
def test_a_flag_and_a_configuration_that_differ_are_refused(flags, config):
    """Also where the configuration says what would be so without it."""
    parser = OneLineParser(prog="t")
    add_model_arguments(parser)
    with pytest.raises(UserError, match="expected one value"):
        parse(parser, [*flags, "--speculative-config", json.dumps(config)])


def choices(flag):
    """What a flag of the shared ones may be, on the command line."""
    parser = OneLineParser(prog="t")
    add_model_arguments(parser)
    return next(a.choices for a in parser._actions if flag in a.option_strings)


def test_choices_are_the_tables():
    aliases = [alias for kind in DRAFTERS.values() for alias in kind.aliases]
    assert list(choices("--drafter")) == ["auto", *DRAFTERS, *aliases]
    assert choices("--verifier") == VERIFIERS
    assert choices("--attention") == ATTENTION
    assert choices("--dtype") == DTYPES
    assert set(DTYPES) > {"auto", "bf16", "float32"}


def test_every_option_of_a_drafter_is_a_flag_with_its_default():
    parser = OneLineParser(prog="t")
    add_model_arguments(parser)
    assert draft_options(parser.parse_args([])) == DraftOptions()
    told = parser.parse_args(["--prompt-lookup-max", "1", "--replay-alpha", "0.5",
                              "--self-draft-top-k", "3", "--ngram-threshold", "5"])  # fmt: skip
    expected = DraftOptions(
        max_ngram=1, min_ngram=1, replay_alpha=0.5, self_top_k=3, ngram_threshold=5, kernels=False
    )
    assert draft_options(told, kernels=False) == expected
    assert "independent or draft_model (a smaller model)" in " ".join(parser.format_help().split())


@pytest.mark.parametrize("kind", DRAFTERS)
def test_the_embedded_target_has_a_draft_for_each_drafter_that_needs_one(kind):
    assert (embedded.draft_of(kind) is not None) == (DRAFTERS[kind].draft == "required")
    assert embedded.draft_of("auto") == embedded.draft_of("independent")


def one_error_line(capsys):
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert "Traceback" not in line
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "/no/such/model", "--prompt", "a"], "'/no/such/model' does not exist"),
        (["--prompt", "a", "--device", "cuda:99"], "expected a CUDA device of this machine"),
        (["--target", "nowhere", "--prompt", "a"], "'nowhere' does not exist"),
        (["--gamma", "x"], "expected auto or an integer >= 0, got 'x'"),
        (["--drafter", "psychic"], "invalid choice: 'psychic'"),
        (["--batch-size", "0"], "expected an integer >= 1, got '0'"),
        (["--dtype", "int3"], "invalid choice: 'int3'"),
        (["--speculative-config", '{"k": 1}'], "unknown key 'k'"),
        (["--speculative-config", "["], "expected a JSON object"),
        (["--logit-bias", "[1]"], "expected JSON like"),
        (["--prompt", "a", "--top-p", "3"], "top_p must be in (0, 1], got 3.0"),
        ([], "exactly one of --prompt and --prompts"),
        (["--prompts", "/no/file.jsonl"], "cannot read prompts from /no/file.jsonl"),
        (["--frobnicate"], "unrecognized arguments"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(["generate", *arguments]) == 2
    assert message in one_error_line(capsys)


def test_mistakes_found_with_the_model_loaded(models, capsys):
    cases = [
        (["--prompt", "w7", "--draft", str(models / "foreign")], "vocabular"),
        (["--prompt", "w7", "--draft", str(models / "absent")], "absent' does not exist"),
        (["--prompt", "w7", "--drafter", "independent"], "needs a draft (--draft), got none"),
        (["--prompt", "w7", "--drafter", "replay", "--replay-alpha", "2"], "number in [0, 1]"),
        (["--prompt", "w7", "--resume"], "--resume needs --output"),
    ]
    for arguments, message in cases:
        assert run(models, *arguments) == 2
        assert message in one_error_line(capsys)


def test_unreadable_line_stops_before_the_model_is_loaded(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\nnonsense\n')
    assert main(["generate", "--target", str(tmp_path), "--prompts", str(path)]) == 2
    assert "p.jsonl:2: expected a JSON object" in one_error_line(capsys)


def test_a_draft_may_be_a_hub_name_as_a_target_may(models, capsys, monkeypatch):
    def from_hub(name, what):
        if name != "someone/draft":
            raise UserError(f"{what} {name!r} is not there")
        return models / "draft"

    monkeypatch.setattr("decoder.checkpoint.folder._from_hub", from_hub)
    arguments = ("--prompt", "w7", "--max-new-tokens", "2", "--json", "--draft")
    assert run(models, *arguments, "someone/draft") == 0
    capsys.readouterr()
    assert run(models, *arguments, "someone/else") == 2
    assert "'someone/else' is not there" in one_error_line(capsys)


def test_a_program_that_waits_for_an_answer_gets_one(models, tmp_path, monkeypatch):
    """At standard input, before it writes its next line, whatever the batch has room for."""
    results, answered = tmp_path / "out.jsonl", []
    read_end, write_end = os.pipe()

    def ask():
        for _ in range(3):
            os.write(write_end, b'{"prompt": "w7"}\n')
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and results.read_bytes().count(b"\n") == len(
                answered
            ):
                time.sleep(0.01)
            answered.append(results.read_bytes().count(b"\n"))
        os.close(write_end)

    results.touch()
    asking = threading.Thread(target=ask)
    asking.start()
    with os.fdopen(read_end) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        flags = ("--prompts", "-", "--output", str(results), "--max-new-tokens", "2")
        assert run(models, *flags) == 0
    asking.join()
    assert answered == [1, 2, 3]


def test_compare_reads_standard_input_once(monkeypatch):
    for limit, count in ((None, 3), (2, 2)):
        data = b'{"prompt": "a"}\n' * 3
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert len(load_prompts("-", limit)) == count
    for data, message in ((b"", "at least one prompt"), (b"nonsense", "standard input:1: ")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        with pytest.raises(UserError, match=message):
            load_prompts("-", None)
