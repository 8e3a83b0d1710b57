"""Prompt and result files: bad lines are named, results survive interruption, resume continues."""

import gzip
import json

import pytest

from decoder.cli.files import LineId, ResultWriter, check_prompts, read_prompts
from decoder.errors import UserError
from decoder.requests.outputs import Output, SequenceStats


def output(index, name=None, text="x"):
    return Output(index, LineId(index, name), None, [1, 2], text, "length", SequenceStats(3))


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_reads_text_tokens_parameters_and_ignores_other_fields(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        '{"prompt": "a", "id": "one", "temperature": 0.5, "test": 1}',
        "",
        '{"token_ids": [1, 2], "task_id": "two"}',
        '{"prompt": "b"}',
    )
    assert list(read_prompts(path)) == [
        {"prompt": "a", "temperature": 0.5, "id": LineId(0, "one")},
        {"token_ids": [1, 2], "id": LineId(1, "two")},
        {"prompt": "b", "id": LineId(2, None)},
    ]
    assert check_prompts(path) == 3


def test_reads_gzip(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"prompt": "a"}\n')
    assert check_prompts(path) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "expected a JSON object"),
        ("[1]", "expected a JSON object, got list"),
        ("{}", "exactly one of"),
        ('{"prompt": 3}', '"prompt" must be text, got int'),
        ('{"token_ids": ["a"]}', '"token_ids" must be a list of integers'),
        ('{"prompt": "a", "top_p": 7}', "top_p must be in"),
        ('{"prompt": "a", "stop": 7}', "stop|iterable"),
    ],
)
def test_names_the_bad_line(tmp_path, line, message):
    path = write(tmp_path / "p.jsonl", '{"prompt": "fine"}', line)
    with pytest.raises(UserError, match=f"p.jsonl:2: .*({message})"):
        check_prompts(path)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match=r"cannot read prompts from .*No such file"):
        check_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="expected at least one prompt, got none"):
        check_prompts(write(tmp_path / "empty.jsonl", ""))
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(b"not gzip")
    with pytest.raises(UserError, match="cannot read prompts from"):
        check_prompts(broken)


def test_every_line_is_on_disk_when_written(tmp_path):
    path = tmp_path / "out.jsonl"
    writer = ResultWriter(path)
    writer.write(output(0, text="é\n"))
    (line,) = path.read_text(encoding="utf-8").splitlines()
    record = json.loads(line)
    assert record["text"] == "é\n"
    assert record["token_ids"] == [1, 2]
    assert "id" not in record
    writer.close()


def test_resume_drops_a_half_line_and_skips_finished_prompts(tmp_path):
    path = tmp_path / "out.jsonl"
    with ResultWriter(path) as writer:
        writer.write(output(0))
        writer.write(output(2, "named"))
    with path.open("a") as file:
        file.write('{"index": 1, "te')
    prompts = [{"id": LineId(i, n)} for i, n in enumerate((None, None, "named", "other"))]
    with ResultWriter(path, resume=True) as writer:
        assert [p["id"].index for p in writer.pending(prompts)] == [1, 3]
        writer.write(output(1))
    indices = [json.loads(line)["index"] for line in path.read_text().splitlines()]
    assert indices == [0, 2, 1]


def test_writing_anew_overwrites_and_resume_needs_a_file(tmp_path):
    path = write(tmp_path / "out.jsonl", '{"index": 0}')
    with ResultWriter(path) as writer:
        assert not writer.done
    assert path.read_text() == ""
    with pytest.raises(UserError, match="--resume needs --output"):
        ResultWriter(None, resume=True)
    with pytest.raises(UserError, match="cannot write to"):
        ResultWriter(tmp_path / "absent" / "out.jsonl")
