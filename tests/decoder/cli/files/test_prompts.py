"""Prompt files: what a line may be, what a file may be, and how mistakes are named."""

import gzip
import io
import json
import os
import sys
import threading

import pytest

from decoder.cli.files.prompt_lines import BadLine, LineId
from decoder.cli.files.prompts import (
    arriving_prompts,
    check_prompts,
    is_same_file,
    is_stream,
    read_prompts,
)
from decoder.errors import UserError
from decoder.requests.reader import NotYet


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_reads_text_tokens_parameters_and_ignores_fields_of_data_sets(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        '{"prompt": "a", "id": "one", "temperature": 0.5, "test": 1, "turns": [{"a": 1}]}',
        "",
        '{"token_ids": [1, 2], "task_id": "two", "entry_point": "f", "top_k": null}',
        '{"prompt": "b", "id": null, "question_id": 7}',
        '{"question_id": 81, "category": "writing", "turns": ["ask", "and again"]}',
    )
    assert list(read_prompts(path)) == [
        {"prompt": "a", "temperature": 0.5, "id": LineId(0, "one")},
        {"token_ids": [1, 2], "id": LineId(1, "two")},
        {"prompt": "b", "id": LineId(2, None)},
        {"prompt": "ask", "id": LineId(3, None)},
    ]
    assert check_prompts(path) == 4


def test_a_chat_is_read_whole_and_known_by_what_its_template_is_given(tmp_path):
    chat = {"messages": [{"role": "user", "content": "é", "name": "n"}], "tools": [{"type": "f"}]}
    lines = [{**chat, "id": "x"}, {**chat, "chat_template_kwargs": {"thinking": False}}, chat]
    path = write(tmp_path / "p.jsonl", *map(json.dumps, lines))
    first, other, same = read_prompts(path)
    assert first == {**chat, "id": LineId(0, "x")}
    assert first["id"].digest == same["id"].digest != other["id"].digest


def test_a_line_carries_metadata_and_what_identifies_its_prompt(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        '{"prompt": "a", "metadata": {"split": ["x", 1]}}',
        '{"prompt": "a", "id": "other"}',
        '{"prompt": "a", "top_k": 3}',
    )
    first, same, other = (prompt["id"] for prompt in read_prompts(path))
    assert first.metadata == {"split": ["x", 1]}
    assert first.digest == same.digest != other.digest


def test_reads_gzip_byte_order_mark_and_carriage_returns(tmp_path):
    text = '\ufeff{"prompt": "é\\u0000"}\r\n\r\n{"prompt": "b"}'
    plain, packed = tmp_path / "p.jsonl", tmp_path / "p.jsonl.gz"
    plain.write_bytes(text.encode())
    packed.write_bytes(gzip.compress(text.encode()))
    for path in (plain, packed):
        assert [prompt["prompt"] for prompt in read_prompts(path)] == ["é\0", "b"]


def test_a_bad_line_keeps_its_number_and_name(tmp_path):
    path = write(tmp_path / "p.jsonl", "nonsense", '{"id": "x", "oops": 1}', '{"prompt": "b"}')
    bad, named, good = read_prompts(path)
    assert isinstance(bad, BadLine) and bad.id == LineId(0)
    assert isinstance(named, BadLine) and named.id == LineId(1, "x")
    assert good["id"] == LineId(2)


def test_standard_input_is_bytes_or_what_stands_in_for_it(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "a"}\n\xff\n')))
    first, second = read_prompts("-")
    assert first["prompt"] == "a"
    assert second.reason == "standard input:2: expected UTF-8, got byte 0xff at column 1"
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"prompt": "b"}'))
    assert next(read_prompts("-"))["prompt"] == "b"
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input: it is closed"):
        next(read_prompts("-"))


def test_an_empty_file_and_a_missing_one(tmp_path):
    with pytest.raises(UserError, match=r"cannot read prompts from .*No such file"):
        check_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="expected at least one prompt, got none"):
        check_prompts(write(tmp_path / "empty.jsonl", ""))


def test_a_pipe_of_the_shell_is_a_stream_and_a_fifo_is_none(tmp_path):
    read_end, write_end = os.pipe()
    os.write(write_end, json.dumps({"prompt": "a"}).encode())
    os.close(write_end)
    path = f"/proc/self/fd/{read_end}"
    assert is_stream(path) and is_stream("-")
    assert [prompt["prompt"] for prompt in read_prompts(path)] == ["a"]
    os.close(read_end)
    os.mkfifo(tmp_path / "fifo")
    assert not is_stream(tmp_path / "fifo")
    assert not is_stream(tmp_path / "absent")


def test_one_file_by_many_names(tmp_path, monkeypatch):
    path = write(tmp_path / "p.jsonl", "x")
    (tmp_path / "link").symlink_to(path)
    os.link(path, tmp_path / "hard")
    monkeypatch.chdir(tmp_path)
    with path.open() as file:
        for other in ("link", "hard", "p.jsonl", "./../" + tmp_path.name + "/p.jsonl"):
            assert is_same_file(path, other)
        assert is_same_file("link", file.fileno())
    assert not is_same_file(path, write(tmp_path / "other", "x"))
    assert not is_same_file(path, tmp_path / "absent")
    assert not is_same_file("/dev/null", "/dev/null")


def test_a_pipe_that_has_no_line_yet_says_so_unless_it_may_wait():
    read_end, write_end = os.pipe()
    waits = []
    prompts = arriving_prompts(f"/proc/self/fd/{read_end}", lambda: bool(waits))
    seen = []

    def send(text):
        os.write(write_end, text.encode())
        while not isinstance(item := next(prompts), NotYet):
            seen.append(item["prompt"])

    send("\ufeff")
    send('{"prompt": "a"}\n\n{"prompt": "b"}\n{"pro')
    assert seen == ["a", "b"]
    send('mpt": "c"}')
    assert seen == ["a", "b"]
    send('\n{"prompt": "' + "d" * 60_000 + '"}\n{"prompt": "e"}')
    assert seen[2:] == ["c", "d" * 60_000]
    waits.append(threading.Timer(0.2, os.close, [write_end]))
    waits[0].start()
    assert [item["prompt"] for item in prompts] == ["e"]
    os.close(read_end)
