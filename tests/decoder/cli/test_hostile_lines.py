"""Prompt lines and files that cannot be read: named in one line, before anything is loaded."""

import gzip
import json
import os

import pytest
from support.hostile.lines import contents, refused

from decoder.cli import setup

DEEP = 5000

# A second line, and what the message says after file and line number.
LINES = [
    (b"nonsense", "expected a JSON object, got 'nonsense' (Expecting value, column 1)"),
    (b"{oops", "expected a JSON object, got '{oops'"),
    (b'{"prompt": "a"', "expected a JSON object"),
    (b'{"prompt": "a"} {"prompt": "b"}', "expected a JSON object"),
    (b'{"prompt": "a",}', "expected a JSON object"),
    (b"{'prompt': 'a'}", "expected a JSON object"),
    (b"[1]", "expected a JSON object, got a list"),
    (b"null", "expected a JSON object, got null"),
    (b"true", "expected a JSON object, got true"),
    (b"17", "expected a JSON object, got an integer"),
    (b'"text"', "expected a JSON object, got text"),
    (b"\0\0\0", "expected a JSON object"),
    (b'{"prompt": "a\0"}', "expected a JSON object"),
    (b'\xef\xbb\xbf{"prompt": "a"}', "expected a JSON object"),
    (b"\x1b]0;title\x07", "expected a JSON object, got '\\x1b]0;title\\x07'"),
    (b'{"prompt": "\xff"}', "expected UTF-8, got byte 0xff at column 13"),
    ('{"prompt": "ä"}'.encode("utf-16"), "expected UTF-8, got byte 0xff at column 1"),
    (b'{"prompt": "\xed\xa0\x80"}', "expected UTF-8, got byte 0xed"),
    (b"[" * DEEP, "nested too deeply"),
    (b'{"prompt": "", "metadata": ' + b"[" * 40 + b"]" * 40 + b"}", "must not be nested more than"),
    (b'{"a": ' * DEEP, "nested too deeply"),
    (b"{}", 'expected exactly one of "prompt", "token_ids", "messages", got none'),
    (b'{"text": "a"}', """got none beside ['text']"""),
    (b'{"turns": [], "question_id": 81}', """got none beside ['turns', 'question_id']"""),
    (b'{"turns": [1]}', """got none beside ['turns']"""),
    (b'{"id": "x"}', "got none"),
    (b'{"prompt": null}', "got none"),
    (b'{"prompt": "a", "token_ids": [1]}', "got prompt and token_ids"),
    (b'{"prompt": 3}', '"prompt" must be text, got an integer'),
    (b'{"prompt": ["a"]}', '"prompt" must be text, got a list'),
    (b'{"prompt": {"a": 1}}', '"prompt" must be text, got an object'),
    (b'{"prompt": false}', '"prompt" must be text, got false'),
    (b'{"prompt": "\\ud800"}', "lone surrogate '\\ud800'"),
    (b'{"prompt": "a", "id": "\\udfff"}', "lone surrogate"),
    (b'{"prompt": "a", "stop": ["\\ud83d"]}', "lone surrogate"),
    (b'{"prompt": "a", "metadata": {"\\ud800": 1}}', "lone surrogate"),
    (b'{"token_ids": "1 2"}', '"token_ids" must be a list of integers, got text'),
    (b'{"token_ids": 7}', '"token_ids" must be a list of integers, got an integer'),
    (b'{"token_ids": {"0": 1}}', '"token_ids" must be a list of integers, got an object'),
    (b'{"token_ids": []}', "at least one token"),
    (b'{"token_ids": [1, "a"]}', "got text at 1"),
    (b'{"token_ids": [1, 2.0]}', "got a number at 1"),
    (b'{"token_ids": [true]}', "got true at 0"),
    (b'{"token_ids": [null]}', "got null at 0"),
    (b'{"token_ids": [[1]]}', "got a list at 0"),
    (b'{"token_ids": [-1]}', "got -1 at 0"),
    (b'{"token_ids": [2147483648]}', "got 2147483648 at 0"),
    (b'{"token_ids": [1' + b"0" * 100 + b"]}", "at 0"),
    (b'{"token_ids": [1' + b"0" * 5000 + b"]}", "digits"),
    (b'{"prompt": "a", "id": 1.5}', '"id" must be text or an integer, got a number'),
    (b'{"prompt": "a", "id": true}', '"id" must be text or an integer, got true'),
    (b'{"prompt": "a", "id": ["x"]}', '"id" must be text or an integer, got a list'),
    (b'{"prompt": "a", "task_id": {}}', '"task_id" must be text or an integer, got an object'),
    (b'{"prompt": "a", "prompt": "b"}', "expected every key once, got 'prompt' twice"),
    (b'{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}', "got '1' twice"),
    (b'{"prompt": "a", "metadata": {"x": {"y": 1, "y": 1}}}', "got 'y' twice"),
    (b'{"prompt": "a", "temperature": NaN}', "expected numbers as JSON has them, got NaN"),
    (b'{"prompt": "a", "top_p": Infinity}', "got Infinity"),
    (b'{"prompt": "a", "metadata": -Infinity}', "got -Infinity"),
    (b'{"prompt": "a", "temperature": 1e400}', "that a float can hold, got '1e400'"),
    (b'{"prompt": "a", "max_tokens": 5}', "'max_tokens'; did you mean 'max_new_tokens'"),
    (b'{"promt": "a"}', "unknown key 'promt'; did you mean 'prompt'"),
    (b'{"prompt": "a", "temprature": 1}', "did you mean 'temperature'"),
    (b'{"prompt": "a", "Temperature": 1}', "did you mean 'temperature'"),
    (b'{"prompt": "a", "stop_tokens": [1]}', "did you mean 'stop_token_ids'"),
    (b'{"prompt": "a", "zzz": 1}', "unknown key 'zzz'; known: prompt, token_ids, messages"),
    (b'{"prompt": "a", "": 1}', "unknown key ''"),
    (b'{"prompt": "a", "' + b"k" * 3000 + b'": 1}', "unknown key 'kkk"),
    (b'{"messages": [{"role": "user", "content": "hi"}], "prompt": "a"}', "prompt and messages"),
    (b'{"messages": "hi"}', "messages must be a list of messages, got 'hi'"),
    (b'{"messages": {"role": "user", "content": "hi"}}', "must be a list of messages, got {"),
    (b'{"messages": []}', "messages must have at least one message, got none"),
    (b'{"messages": [null]}', "messages[0] must be an object"),
    (b'{"messages": [{}]}', "messages[0] must have a \"role\" that is text, got None"),
    (b'{"messages": [{"content": "hi"}]}', "messages[0] must have a \"role\""),
    (b'{"messages": [{"role": ["user"], "content": "hi"}]}', "is text, got ['user']"),
    (b'{"messages": [{"role": "user"}]}', 'messages[0] must have "content", got none'),
    (b'{"messages": [{"role": "user", "content": 7}]}', '"content" of text, got 7'),
    (b'{"messages": [{"role": "user", "content": [7]}]}', '"text" in its "content", got 7'),
    (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "got 'image_url'"),
    (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', '"text" in each part'),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "lone surrogate"),
    (b'{"messages": [{"role": "user", "role": "user", "content": "hi"}]}', "got 'role' twice"),
    (b'{"messages": ' + b"[" * 40 + b"]" * 40 + b"}", '"messages" must not be nested more than'),
    (b'{"messages": [{"role": "user", "content": "hi"}], "tools": 3}', "tools must be a list of"),
    (b'{"messages": [{"role": "user", "content": "hi"}], "tols": 3}', "did you mean 'tools'"),
    (b'{"messages": [{"role": "user", "content": "hi"}], "continue_final_message": 1}', "got 1"),
    (b'{"prompt": "hi", "tools": []}', "tools is read with messages only, got prompt"),
    (b'{"index": 0, "text": "", "token_ids": [1], "finish_reason": "eos"}', "unknown key 'index'"),
    (b'{"prompt": "a", "top_p": 7}', "top_p must be in (0, 1], got 7"),
    (b'{"prompt": "a", "top_p": true}', "top_p must be"),
    (b'{"prompt": "a", "top_k": "3"}', "top_k must be"),
    (b'{"prompt": "a", "top_k": -1}', "top_k must be an integer >= 0, got -1"),
    (b'{"prompt": "a", "temperature": "hot"}', "temperature must be"),
    (b'{"prompt": "a", "temperature": [1]}', "temperature must be"),
    (b'{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens must be an integer >= 1, got 0"),
    (b'{"prompt": "a", "min_new_tokens": -1}', "min_new_tokens must be"),
    (b'{"prompt": "a", "seed": -1}', "seed must be"),
    (b'{"prompt": "a", "seed": 9223372036854775808}', "seed must be"),
    (b'{"prompt": "a", "stop": [""]}', "stop must be non-empty strings"),
    (b'{"prompt": "a", "stop": [1]}', "stop must be a list of"),
    (b'{"prompt": "a", "stop_token_ids": ["a"]}', "stop_token_ids must be a list of"),
    (b'{"prompt": "a", "stop_token_ids": [true]}', "stop_token_ids must be a list of"),
    (b'{"prompt": "a", "logprobs": -1}', "logprobs must be"),
    (b'{"prompt": "a", "logit_bias": {"-1": 1}}', "logit_bias must be"),
]  # fmt: skip

GOOD = b'{"prompt": "fine"}\n'


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    def load(*args):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(setup.Setup, "__init__", load)


def generate(*arguments):
    return ["generate", *map(str, arguments)]


def test_there_are_as_many_as_the_docstrings_say():
    assert len(LINES) >= 95


@pytest.mark.parametrize(("line", "message"), LINES)
def test_a_line(line, message, tmp_path, capsys):
    path, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(GOOD + line)
    out.write_text('{"index": 0, "finish_reason": "eos"}\n')
    said = refused(generate("--prompts", path, "--output", out), message, tmp_path, capsys)
    assert said.startswith(f"moesd: error: {path}:2: ")


def hostile_files(folder):
    """Name of the prompts, and what the line says."""
    (folder / "folder").mkdir()
    (folder / "empty").write_bytes(b"")
    (folder / "blank").write_bytes(b"\n \r\n\n")
    (folder / "mark").write_bytes(b"\xef\xbb\xbf")
    (folder / "zeros").write_bytes(b"\0" * 4096)
    (folder / "random").write_bytes(bytes(range(256)))
    (folder / "no.gz").write_bytes(GOOD)
    packed = gzip.compress(GOOD * 500)
    (folder / "packed").write_bytes(packed)
    (folder / "cut.gz").write_bytes(packed[:-12])
    (folder / "flipped.gz").write_bytes(packed[:-6] + b"\1\2\3\4\5\6")
    (folder / "none.gz").write_bytes(b"")
    (folder / "bad.gz").write_bytes(gzip.compress(b"nonsense\n"))
    (folder / "dangling").symlink_to(folder / "absent")
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "fifo")
    return [
        ("absent", "No such file"),
        ("folder", "Is a directory"),
        ("folder/", "Is a directory"),
        ("empty/x", "Not a directory"),
        ("empty", "expected at least one prompt, got none"),
        ("blank", "expected at least one prompt, got none"),
        ("mark", "expected at least one prompt, got none"),
        ("zeros", "zeros:1: expected a JSON object"),
        ("random", "random:1: expected"),
        ("no.gz", "cannot read prompts from"),
        ("packed", "packed:1: expected UTF-8"),
        ("cut.gz", "cannot read prompts from"),
        ("flipped.gz", "cannot read prompts from"),
        ("none.gz", "expected at least one prompt, got none"),
        ("bad.gz", "bad.gz:1: expected a JSON object"),
        ("dangling", "No such file"),
        ("loop", "cannot read prompts from"),
        ("fifo", "expected a file, got a FIFO"),
        ("a" * 300, "File name too long"),
        ("nul\0", "--prompts"),
        ("/dev/zero", "expected a file, got a device"),
        ("/dev/null", "expected a file, got a device"),
        ("/proc/self/mem", "cannot read prompts from /proc/self/mem"),
    ]


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_a_prompt_file(command, tmp_path, capsys):
    cases = hostile_files(tmp_path)
    assert len(cases) >= 20
    for name, message in cases:
        path = name if name.startswith("/") else f"{tmp_path}/{name}"
        refused([command, "--prompts", path], message, tmp_path, capsys)


def test_results_where_they_must_not_go(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("p.jsonl", "notes.txt", "weights"):
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "link").symlink_to("p.jsonl")
    (tmp_path / "folder").mkdir()
    os.link(tmp_path / "p.jsonl", tmp_path / "hard")
    os.mkfifo(tmp_path / "fifo")
    before = contents(tmp_path)
    cases = [
        ("p.jsonl", "elsewhere than the prompts"),
        ("./p.jsonl", "elsewhere than the prompts"),
        (str(tmp_path / "p.jsonl"), "elsewhere than the prompts"),
        ("folder/../p.jsonl", "elsewhere than the prompts"),
        ("link", "elsewhere than the prompts"),
        ("hard", "elsewhere than the prompts"),
        ("notes.txt", "notes.txt holds something else than results"),
        ("weights", "weights holds something else than results"),
        ("folder", "cannot write to folder: Is a directory"),
        ("absent/out.jsonl", "cannot write to absent/out.jsonl: No such file"),
        ("notes.txt/out.jsonl", "cannot write to notes.txt/out.jsonl: Not a directory"),
        ("fifo", "cannot write to fifo"),
        ("/proc/version", "/proc/version"),
    ]
    for output, message in cases:
        for more in ([], ["--resume"]):
            arguments = generate("--prompts", "p.jsonl", "--output", output, *more)
            expected = message if not more or output not in ("folder", "fifo") else output
            refused(arguments, expected, tmp_path, capsys)
    assert contents(tmp_path) == before


def test_results_of_other_prompts_are_not_resumed(tmp_path, capsys):
    path, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(GOOD)
    record = {"index": 0, "id": "other", "finish_reason": "eos"}
    out.write_text(json.dumps(record) + "\n")
    arguments = generate("--prompts", path, "--output", out, "--resume")
    refused(arguments, "got one of another prompt 1 (other)", tmp_path, capsys)
