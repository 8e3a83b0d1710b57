"""Result files: what is finished is on disk, resume continues, and what is not ours stays."""

import fcntl
import json
import os
import sys
from contextlib import suppress

import pytest

from decoder.cli.files.prompt_lines import LineId
from decoder.cli.files.results import ResultWriter, RunStopped, as_record
from decoder.errors import UserError
from decoder.requests.outputs import Output, SequenceStats


def output(index, name=None, text="x", **rest):
    return Output(
        index, LineId(index, name), None, [1, 2], text, "length", SequenceStats(3), **rest
    )


def written(path, *outputs, resume=False):
    with ResultWriter(path, resume=resume) as writer:
        writer.begin()
        for one in outputs:
            writer.write(one)
    return path


def indices(path):
    return [json.loads(line)["index"] for line in path.read_text().splitlines()]


def pending(writer, *line_ids):
    return [line_id.index for line_id in line_ids if not writer.is_done(line_id)]


def test_every_line_is_on_disk_when_written(tmp_path):
    path = tmp_path / "out.jsonl"
    writer = ResultWriter(path)
    writer.begin()
    writer.write(output(0, text="é\n"))
    (line,) = path.read_text(encoding="utf-8").splitlines()
    record = json.loads(line)
    assert record["text"] == "é\n"
    assert record["token_ids"] == [1, 2]
    assert not {"id", "seed", "error", "digest", "metadata"} & set(record)
    writer.close()


def test_a_record_says_its_seed_its_metadata_or_its_error():
    line_id = LineId(4, "x", "abc", {"k": 1})
    done = as_record(Output(0, line_id, None, [1], "t", "eos", SequenceStats(3), seed=9))
    assert (done["seed"], done["metadata"], done["digest"]) == (9, {"k": 1}, "abc")
    failed = as_record(Output(0, line_id, None, [], "", "error", SequenceStats(3), error="why"))
    assert failed == {"index": 4, "id": "x", "digest": "abc", "metadata": {"k": 1}, "error": "why"}


def test_resume_drops_a_half_line_and_skips_what_has_a_result_or_an_error(tmp_path):
    path = written(tmp_path / "out.jsonl", output(0), output(2, "named"), output(4, error="bad"))
    with path.open("a") as file:
        file.write('{"index": 1, "te')
    lines = [LineId(i, n) for i, n in enumerate((None, None, "named", "other", None))]
    with ResultWriter(path, resume=True) as writer:
        assert pending(writer, *lines) == [1, 3]
        writer.begin()
        writer.write(output(1))
    assert indices(path) == [0, 2, 4, 1]


@pytest.mark.parametrize("tail", ["", "\n"])
def test_a_whole_last_line_counts_with_and_without_its_end(tmp_path, tail):
    path = tmp_path / "out.jsonl"
    path.write_text(json.dumps(as_record(output(0))) + tail)
    written(path, output(1), resume=True)
    assert indices(path) == [0, 1]


def test_the_same_name_twice_is_two_prompts_and_an_index_is_no_name(tmp_path):
    path = written(tmp_path / "out.jsonl", output(0, "a"), output(3))
    with ResultWriter(path, resume=True) as writer:
        assert pending(writer, LineId(0, "a"), LineId(1, "a"), LineId(2, 3), LineId(3)) == [1, 2]


@pytest.mark.parametrize(
    ("line_id", "wrong"),
    [(LineId(0, "a", "d1"), False), (LineId(0, "a", "d2"), True), (LineId(0, "b", "d1"), True),
     (LineId(0, None, "d1"), True), (LineId(1, "a", "d1"), False)],
)  # fmt: skip
def test_results_of_other_prompts_are_not_resumed(tmp_path, line_id, wrong):
    path = tmp_path / "out.jsonl"
    path.write_text('{"index": 0, "id": "a", "digest": "d1", "finish_reason": "eos"}\n')
    with ResultWriter(path, resume=True) as writer:
        if wrong:
            with pytest.raises(UserError, match="of another prompt"):
                writer.is_done(line_id)
        else:
            assert writer.is_done(line_id) is (line_id.index == 0)


def test_results_of_older_versions_are_resumed(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"index": 0, "text": "", "token_ids": [], "finish_reason": "eos"}\n')
    with ResultWriter(path, resume=True) as writer:
        assert pending(writer, LineId(0, None, "digest"), LineId(1)) == [1]


def test_nothing_changes_before_the_run_begins(tmp_path):
    path, new = written(tmp_path / "out.jsonl", output(0)), tmp_path / "new.jsonl"
    before = path.read_bytes()
    for resume in (False, True):
        with ResultWriter(path, resume=resume), ResultWriter(new):
            assert new.exists()
    assert path.read_bytes() == before
    assert not new.exists()
    assert written(path).read_bytes() == b""  # results are overwritten by the next run's


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "content",
    [b"notes", b"notes\n", b'{"prompt": "a"}\n', b'{"index": 0}\n', b"\0" * 100, b"\x80\x04\n",
     b'{"index": 0, "prompt": "mine"}\n', b"[1]\n", b"\n", b'"index"'],
)  # fmt: skip
def test_a_file_of_somebody_else_stays(tmp_path, content, resume):
    path = tmp_path / "mine"
    path.write_bytes(content)
    with pytest.raises(UserError, match="holds something else than results"):
        ResultWriter(path, resume=resume)
    assert path.read_bytes() == content


def test_two_runs_cannot_write_to_one_file(tmp_path):
    path = tmp_path / "out.jsonl"
    with ResultWriter(path) as writer:
        writer.begin()
        with pytest.raises(UserError, match="another run writes to it"):
            ResultWriter(path, resume=True)
        writer.write(output(0))
    assert indices(written(path, output(1), resume=True)) == [0, 1]


def test_prompts_are_no_place_for_results(tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    path.write_text('{"index": 0, "finish_reason": "eos"}\n')
    (tmp_path / "link").symlink_to(path)
    os.link(path, tmp_path / "hard")
    with path.open("r+") as file:
        for prompts in (str(path), str(tmp_path / "link"), str(tmp_path / "hard"), file.fileno()):
            with pytest.raises(UserError, match=r"elsewhere than the prompts, got --output .*p\.j"):
                ResultWriter(path, resume=True, prompts=prompts)
        monkeypatch.setattr(sys, "stdout", file)
        with pytest.raises(UserError, match="got standard output for both"):
            ResultWriter(None, prompts=str(path))
    assert path.stat().st_size > 0


def test_places_where_nothing_can_be_written(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("absent/out.jsonl", ".", "fifo", "loop", "a" * 300, "nul\0"):
        with pytest.raises(UserError, match=r"^cannot write to .*: "):
            ResultWriter(tmp_path / name)
    with pytest.raises(UserError, match="--resume needs a file"):
        ResultWriter("/dev/null", resume=True)
    with pytest.raises(UserError, match="--resume needs --output"):
        ResultWriter(None, resume=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "loop"]


def test_a_full_device_stops_the_run_in_one_line(monkeypatch):
    with ResultWriter("/dev/full") as writer:
        writer.begin()
        with pytest.raises(RunStopped, match="cannot write to /dev/full: No space left"):
            writer.write(output(0))
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(RunStopped, match="cannot write to standard output: No space left"):
        ResultWriter(None).write(output(0))
    with suppress(OSError):
        full.close()


def test_a_narrow_standard_output_gets_escapes(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "_encoding", "ascii", raising=False)
    monkeypatch.setattr(type(sys.stdout), "encoding", "ascii", raising=False)
    ResultWriter(None).write(output(0, text="é"))
    assert "\\u00e9" in capsys.readouterr().out


def test_a_file_that_its_maker_removes_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    first = ResultWriter(path)  # which will fail before its first result
    lock = fcntl.flock

    def late(descriptor, operation):
        first.close()
        return lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert indices(written(path, output(3))) == [3]
