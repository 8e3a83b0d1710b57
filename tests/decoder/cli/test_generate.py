"""What a run leaves behind: results, errors in their place, exit codes, and a file to resume.

The decoder is scripted; ``test_generate_stopped.py`` kills real ones.
"""

import io
import json
import sys
from types import SimpleNamespace

import pytest

from decoder.__main__ import main
from decoder.cli import setup
from decoder.cli.files.prompts import read_prompts
from decoder.cli.streams import Terminated
from decoder.engine.metrics import DecoderStats
from decoder.errors import UserError
from decoder.requests.outputs import Output, SequenceStats


class ScriptedDecoder:
    """Echoes prompts; ``fail`` in one gives an error, ``raise`` whatever ``failure`` is."""

    def __init__(self, failure=None, refusal=None):
        self.stats = DecoderStats()
        self.reader = SimpleNamespace(read=self._read)
        self.failure, self.refusal = failure, refusal

    def is_idle(self):
        return True

    def _read(self, index, prompt, params):
        if self.refusal is not None:
            raise UserError(f"prompt {index}: {self.refusal}")

    def stream(self, prompts, params):
        for index, prompt in enumerate(prompts):
            text, stats = prompt["prompt"], SequenceStats(1)
            if text == "raise":
                raise self.failure
            if text == "fail":
                reason = f"prompt {prompt['id']!r}: too long"
                yield Output(index, prompt["id"], text, [], "", "error", stats, error=reason)
            else:
                yield Output(index, prompt["id"], text, [1], text.upper(), "eos", stats, seed=7)


@pytest.fixture
def decoder(monkeypatch):
    made = ScriptedDecoder()
    scripted = SimpleNamespace(decoder=lambda: made, tokenizer=None, target=None)
    monkeypatch.setattr(setup, "Setup", lambda args: scripted)
    return made


def prompt_file(path, *texts):
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def told(capsys):
    return capsys.readouterr().err.strip().splitlines()


def feed(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_prompt_that_fails_has_an_error_for_a_result_and_the_run_goes_on(
    decoder, tmp_path, capsys
):
    path, out = prompt_file(tmp_path / "p", "a", "fail", "b", "fail"), tmp_path / "out"
    arguments = ["generate", "--prompts", path, "--output", str(out)]
    assert main(arguments) == 1
    assert told(capsys)[-1] == "moesd: 2 of 4 prompts failed; first: prompt 2: too long"
    found = records(out)
    assert [r.get("text") for r in found] == ["A", None, "B", None]
    assert [r.get("error") for r in found] == [
        None,
        "prompt 2: too long",
        None,
        "prompt 4: too long",
    ]
    assert [r.get("seed") for r in found] == [7, None, 7, None]
    # An error is a result: resuming decodes nothing again, adds nothing, and ends.
    assert main([*arguments, "--resume"]) == 0
    assert records(out) == found


def test_bad_lines_of_standard_input_are_errors_among_the_results(
    decoder, tmp_path, capsys, monkeypatch
):
    lines = [b'{"prompt": "a", "metadata": [1]}', b"nonsense", b'{"id": "x", "promt": "b"}', b"",
             b'{"prompt": "\xff"}', b'{"prompt": "c", "id": "y"}']  # fmt: skip
    out = tmp_path / "out"
    arguments = ["generate", "--prompts", "-", "--output", str(out)]
    feed(monkeypatch, b"\n".join(lines))
    assert main(arguments) == 1
    assert told(capsys)[-1].startswith("moesd: 3 of 5 prompts failed; first: standard input:2: ")
    found = {r["index"]: r for r in records(out)}
    assert {i: r.get("id") for i, r in found.items()} == {0: None, 1: None, 2: "x", 3: None, 4: "y"}
    assert [i for i, r in sorted(found.items()) if "error" in r] == [1, 2, 3]
    assert found[0]["metadata"] == [1]
    feed(monkeypatch, b"\n".join(lines))
    assert main([*arguments, "--resume"]) == 0
    assert len(records(out)) == 5


def test_errors_are_shown_where_results_are(decoder, tmp_path, capsys):
    assert main(["generate", "--prompt", "a", "--prompt", "fail", "--color", "never"]) == 1
    assert "error: prompt 2: too long" in capsys.readouterr().out
    assert main(["generate", "--prompt", "fail", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"] == "prompt 1: too long"
    assert captured.err == "moesd: 1 of 1 prompts failed; first: prompt 1: too long\n"


def test_flags_that_no_prompt_of_this_model_can_have_change_nothing(decoder, tmp_path, capsys):
    out = tmp_path / "out"
    out.write_text('{"index": 0, "finish_reason": "eos"}\n')
    before = out.read_bytes()
    decoder.refusal = "logprobs must be at most 97, got 99999"
    arguments = ["generate", "--prompt", "a", "--output", str(out), "--logprobs", "99999"]
    assert main(arguments) == 2
    assert told(capsys) == ["moesd: error: logprobs must be at most 97, got 99999"]
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        (RuntimeError("no\nmemory"), 1, "moesd: error: stopped after 2 results: no memory"),
        (UserError("gone"), 1, "moesd: error: stopped after 2 results: gone"),
        (IndexError("5"), 1, "moesd: error: stopped after 2 results: IndexError: 5"),
        (KeyboardInterrupt(), 130, "interrupted after 2 results"),
        (Terminated(15), 143, "interrupted after 2 results"),
        (Terminated(1), 129, "interrupted after 2 results"),
    ],
)  # fmt: skip
def test_a_run_that_stops_keeps_what_finished_and_resumes(
    decoder, tmp_path, capsys, failure, code, line
):
    path, out = prompt_file(tmp_path / "p", "a", "b", "raise", "c"), tmp_path / "out"
    arguments = ["generate", "--prompts", path, "--output", str(out)]
    decoder.failure = failure
    assert main(arguments) == code
    assert told(capsys) == [line]
    assert [r["index"] for r in records(out)] == [0, 1]
    prompts = list(read_prompts(path))
    decoder.stream = lambda pending, params: (
        Output(0, p["id"], "", [1], "t", "eos", SequenceStats(1)) for p in pending
    )
    assert main([*arguments, "--resume"]) == 0
    assert [r["index"] for r in records(out)] == [0, 1, 2, 3]
    assert [r["digest"] for r in records(out)] == [p["id"].digest for p in prompts]


def test_unseeded_runs_do_not_share_their_seeds(decoder, monkeypatch):
    import torch

    drawn = []
    decoder.stream = lambda prompts, params: drawn.append(int(torch.randint(2**62, ()))) or ()
    unseeded = SimpleNamespace(seed=None)
    monkeypatch.setattr("decoder.cli.generate.sampling_params", lambda *args: unseeded)
    state = torch.get_rng_state()
    try:
        for _ in range(2):
            torch.manual_seed(0)
            assert main(["generate", "--prompt", "a"]) == 0
    finally:
        torch.set_rng_state(state)
    assert drawn[0] != drawn[1]


def test_results_go_where_the_prompts_of_a_data_set_come_from(decoder, tmp_path, monkeypatch):
    """Copies of one task with one id each get their result (pass@k)."""
    path, out = tmp_path / "p", tmp_path / "out"
    line = json.dumps({"task_id": "HumanEval/0", "prompt": "a", "entry_point": "f", "test": "t"})
    path.write_text(f"{line}\n" * 3)
    arguments = ["generate", "--prompts", str(path), "--output", str(out)]
    assert main(arguments) == 0
    whole = out.read_text()
    out.write_text(whole.splitlines(keepends=True)[1])
    assert main([*arguments, "--resume"]) == 0
    assert sorted(out.read_text()) == sorted(whole)
