"""Records, timer, shapes, routing and prompts: what every measurement stands on."""

from __future__ import annotations

import gzip
import json
import re
import shutil

import pytest
import torch
from support.tiny import save_tokenizer
from transformers import AutoTokenizer

from bench.measure.record import Recorder, environment, git_commit, read_lines, sources_digest
from bench.measure.timer import interleaved, summarize
from bench.page.runs import runs_of
from bench.workloads.prompts import load_prompts, prompt_tokens, random_prompts
from bench.workloads.routing import ROUTINGS, distinct_experts, route
from bench.workloads.shapes import Shape, parse_shape


def test_a_line_carries_its_environment_and_reads_back(tmp_path):
    path = tmp_path / "deep" / "lines.jsonl"
    recorder = Recorder(path)
    recorder.write("kernel", T=4)
    recorder.write("other", T=5)
    (line,) = read_lines([tmp_path], "kernel")
    assert line["T"] == 4
    assert {"device", "threads", "versions", "commit", "command"} <= line["env"].keys()


def test_a_command_names_the_variables_that_change_it(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", "generate", "--gamma", "4"])
    monkeypatch.delenv("MOESD_CPU_ISA", raising=False)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    plain = "python -m bench generate --gamma 4"
    huge = f"THP_MEM_ALLOC_ENABLE=1 {plain}"
    assert environment()["command"] == huge
    without, first = ({"env": {"commit": "a", "command": command}} for command in (plain, huge))
    again = {"env": {"commit": "a", "command": f"{huge} --B 8"}}
    assert runs_of([first, without, again]) == [[first, again], [without]]


def test_a_copy_without_its_repository_is_known_by_its_sources(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert re.fullmatch("sources-[0-9a-f]{12}", git_commit())
    assert git_commit() == f"sources-{sources_digest()}"


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"kind": "kernel"}\n{"kind": ')
    with pytest.raises(ValueError, match=r"lines.jsonl:2 is not JSON"):
        list(read_lines([path]))


def test_a_line_does_not_go_on_where_a_killed_process_stopped(tmp_path):
    path = tmp_path / "lines.jsonl"
    for left, kept in (
        ('{"kind": "ker', []),
        ('{"kind": "kernel", "T": 1}\n{"ki', [1]),
        ('{"kind": "kernel", "T": 1}\n{"kind": "kernel", "T": 2}', [1, 2]),
    ):
        path.write_text(left)
        recorder = Recorder(path)
        recorder.write("kernel", T=8)
        recorder.write("kernel", T=9)
        assert [line["T"] for line in read_lines([path])] == [*kept, 8, 9]


def test_what_is_no_half_line_of_ours_is_not_cut_off(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("first\na note of mine")
    Recorder(path).write("kernel", T=8)
    assert path.read_text().startswith("first\na note of mine\n{")


def test_variants_are_interleaved_in_rotated_order():
    seen: list[tuple[str, int]] = []
    variants = {name: (lambda round_, n=name: seen.append((n, round_))) for name in ("a", "b", "c")}
    samples = interleaved(variants, rounds=3)
    assert {len(s) for s in samples.values()} == {3}
    rounds = [[n for n, r in seen if r == round_] for round_ in range(-1, 3)]
    assert rounds == [["c", "a", "b"], ["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


def test_a_call_that_timed_itself_is_taken_at_its_word():
    samples = interleaved({"peer": lambda round_: 0.25}, rounds=3)
    assert samples == {"peer": [0.25, 0.25, 0.25]}


def test_the_budget_leaves_at_least_three_rounds():
    samples = interleaved({"a": lambda round_: None}, rounds=50, budget_s=0.0)
    assert len(samples["a"]) == 3


def test_summary_is_the_median_with_its_quantiles():
    timing = summarize([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (timing.median, timing.p20, timing.p80, timing.rounds) == (3.0, 1.8, 4.2, 5)


@pytest.mark.parametrize("text", ["nope", "1,2,3", "4,8,16,32", "0,0,1,1", "a,b,c,d"])
def test_a_bad_shape_says_what_was_expected(text):
    with pytest.raises(ValueError, match=r"E,K,H,I|K <= E"):
        parse_shape(text)


def test_shapes_by_name_and_by_numbers():
    assert parse_shape("olmoe") == parse_shape("64,8,2048,1024") == Shape(64, 8, 2048, 1024)


@pytest.mark.parametrize("kind", ROUTINGS)
def test_routing_gives_distinct_experts_in_range(kind):
    ids = route(kind, 6, 5, 32, 4, torch.Generator().manual_seed(0))
    assert ids.shape == (30, 4)
    assert ids.min() >= 0 and ids.max() < 32
    assert all(row.unique().numel() == 4 for row in ids)


def test_correlated_routing_reaches_the_union_it_was_asked_for():
    generator = torch.Generator().manual_seed(1)
    mean = lambda kind, ratio: (
        sum(distinct_experts(route(kind, 1, 8, 128, 8, generator, ratio)) for _ in range(200)) / 200
    )
    uniform = mean("uniform", 1.0)
    assert uniform == pytest.approx(128 * (1 - (1 - 8 / 128) ** 8), rel=0.03)  # Eq. 8
    assert mean("correlated", 0.65) / uniform == pytest.approx(0.65, abs=0.04)


def test_prompts_of_both_kinds_of_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"turns": ["b", "c"]}))
    assert load_prompts(str(path)) == ["a", "b"]
    with pytest.raises(FileNotFoundError, match="--prompts-dir"):
        load_prompts("humaneval", folder=tmp_path)
    path.write_text(json.dumps({"text": "a"}))
    with pytest.raises(ValueError, match=r"prompts.jsonl:1 needs prompt or turns"):
        load_prompts(str(path))


def test_prompt_files_as_other_programs_write_them(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('\ufeff{"prompt": "é"}\r\n\r\n{"turns": ["b"]}\r\n\n'.encode())
    assert load_prompts(str(path)) == ["é", "b"]
    for line, said in (("[1]", "a JSON object, got a list"), ("{", "is not JSON"),
                       ('{"prompt": ["a"]}', "that are text")):  # fmt: skip
        path.write_text('{"prompt": "a"}\n' + line)
        with pytest.raises(ValueError, match=rf"prompts.jsonl:2 .*{said}"):
            load_prompts(str(path))


def test_random_prompts_are_seeded():
    assert random_prompts(3, 5, 100) == random_prompts(3, 5, 100)
    assert random_prompts(3, 5, 100) != random_prompts(3, 5, 100, seed=1)


def test_a_chat_model_is_asked_and_begins_once(tmp_path):
    save_tokenizer(tmp_path, ["?", "<bos>", "user", "answer", "Complete", "this", "function:", "f"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps({"prompt": "f"}))
    assert prompt_tokens(tokenizer, "humaneval", tmp_path) == [[7]], "continued where none answers"
    tokenizer.chat_template = (
        "<bos> {% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
        "{% if add_generation_prompt %}answer{% endif %}"
    )
    (asked,) = prompt_tokens(tokenizer, "humaneval", tmp_path)
    assert asked == [1, 2, 4, 5, 6, 0, 7, 0, 3]
    (tmp_path / "mt_bench.jsonl").write_text(json.dumps({"turns": ["f", "this"]}))
    assert prompt_tokens(tokenizer, "mt_bench", tmp_path) == [[1, 2, 7, 3]]
