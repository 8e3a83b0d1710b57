"""The page of a folder of results: its numbers are the lines', and it needs nothing beside it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.page.build import render
from bench.page.headline import headline
from bench.page.questions import TEXTS, _largest_of, _most_gammas, _one_gamma
from bench.page.tables import COLUMNS, tables
from bench.pictures import engine

ENV = {"device": "A CPU, 2 threads", "isa": "AVX512", "commit": "abc1234"}


def line(kind: str, command: str = "", **fields: Any) -> dict[str, Any]:
    env = ENV | {"command": f"python -m bench {command or kind}"}
    return {"kind": kind, "env": env, **fields}


def cell(speedup: float, batch: int = 16, gamma: int = 4, **fields: Any) -> dict[str, Any]:
    values = {"target": "moe", "top_k": 4, "sigma": 0.9, "target_efficiency": 0.8}
    return line("decode", **values | fields, batch=batch, gamma=gamma, speedup=speedup)


def trained(speedup: float, batch: int, gamma: int, **fields: Any) -> dict[str, Any]:
    values = {"target": "smol", "drafter": "eagle", "data": "humaneval", "temperature": 0}
    values |= {"alpha": 0.8, "decided": 9, "sigma": 0.9, "target_efficiency": 0.77}
    values |= {"predicted_speedup": 2.34, "predicted_target_efficiency": 0.8}
    return line("trained", **values | fields, batch=batch, gamma=gamma, speedup=speedup)


def layer(tokens: int, of_roof: float, **fields: Any) -> dict[str, Any]:
    values = {"shape": [8, 2, 64, 64], "dtype": "bfloat16", "routing": "uniform"}
    values |= {"backend": "auto", "not_captured": {}, "B": tokens, "gamma": 0, "floor_s": 1e-3}
    values |= {"ratio": {}, "seconds": {"moesd": dict.fromkeys(("median", "p20", "p80"), 2e-3)}}
    return line("kernel", **values | fields, T=tokens, of_roof=of_roof)


def generated(variant: str, batch: int, new_tokens: int = 32, **against: float) -> dict[str, Any]:
    rates = dict.fromkeys(("median", "p20", "p80"), 10.0 * batch)
    return line(
        "generate",
        f"generate --B {batch}",
        target="moe",
        B=batch,
        variant=variant,
        new_tokens=new_tokens,
        tokens_per_s=rates,
        times_faster_than=against,
    )


def test_four_numbers_with_their_commands_and_processors():
    lines = [
        cell(2.1),
        cell(3.04, batch=32, gamma=8),
        generated("ours", 8, transformers=9.9),
        generated("ours", 32, transformers=3.84),
        generated("ours speculative", 32, transformers=7.0),
        generated("ours", 64, vLLM=2.0),  # transformers did not run here
        layer(1, 0.5, ratio={"grouped_mm": 2.0}),
        layer(8, 0.75, ratio={"grouped_mm": 8.0, "vllm": 1.0}),
        layer(16, 0.95, ratio={"grouped_mm": 4.0}),
        layer(32, 0.1),  # beside no peer
        layer(64, 0.1, ratio={"grouped_mm": 99.0}, not_captured={"grouped_mm": "waits"}),
        line("auto", alpha=0.3, batch=1, against_best=0.5, target="moe"),
    ]
    speedup, loop, grouped, roofline = headline(lines)
    assert speedup.value == "3.0×" and "B = 32, γ = 8, σ = 0.90" in speedup.words
    assert loop.value == "3.8×" and loop.words.endswith("B = 32")
    assert loop.commands == ("python -m bench generate --B 32",)
    assert grouped.value == "4.0×" and "3 points, the lowest 2.00×" in grouped.words
    assert roofline.value == "75 %" and "the lowest 0.50" in roofline.words
    assert roofline.processors == ("A CPU, 2 threads, AVX512",)


def test_a_number_is_of_one_run():
    of = lambda commit, *ratios: [
        layer(1, 0.5, ratio={"grouped_mm": ratio}, env=ENV | {"commit": commit, "command": "x"})
        for ratio in ratios
    ]
    (grouped, _roofline) = headline([*of("old", 9.0), *of("new", 2.0, 8.0), *of("older", 9.0, 9.0)])
    assert grouped.value == "4.0×" and "2 points" in grouped.words


def test_other_numbers_stand_in_where_kinds_are_missing():
    error = {"count": 31, "median": 0.0304, "p90": 0.1, "worst": 0.3, "mse": 0.0}
    lines = [
        line("humaneval", identical=164, sequences=164),
        line("humaneval", identical=163, sequences=164),
        line("auto", alpha=0.3, batch=1, against_best=0.97),
        line("auto", alpha=0.9, batch=8, against_best=0.936),
        line("fit", model="paper", error=error | {"median": 0.5}),
        line("fit", model="improved", error=error),
        layer(32, 0.6),
    ]
    assert [number.value for number in headline(lines)] == ["60 %", "327 / 328", "0.94×", "3.0 %"]
    assert headline(lines)[2].words.endswith("2 cells: α = 0.9, B = 8")
    assert headline([line("roofline", ceilings={})]) == []


def test_a_real_model_comes_first(tmp_path):
    lines = [trained(s, b, g) for s, b, g in ((1.1, 1, 4), (2.61, 32, 4), (1.9, 32, 3))]
    lines += [trained(1.4, 32, 4, data="mt_bench", temperature=1)]
    page = written(tmp_path, lines)
    section = page[page.index("<h2>A real model</h2>") : page.index('<section class="figures">')]
    rows = [re.findall("<td>(.*?)</td>", row) for row in section.split("<tr>")[2:]]
    assert [row[:3] for row in rows] == [
        ["humaneval", "0", "3"],
        ["humaneval", "0", "4"],
        ["mt_bench", "1", "4"],
    ]
    best = ["0.80", "0.90", "0.91", "2.61×", "32", "2.34×", "0.77", "2.18×"]
    assert rows[1][3:] == best, "the batch where it is highest, beside the paper's row"
    asked = re.findall("<figure><h3>(.*?)</h3>", page)
    assert asked[:2] == [
        "When does speculation pay, with a real draft?",
        "What is that speedup made of?",
    ]
    (speedup,) = headline([cell(9.0), *lines])
    assert speedup.value == "2.6×" and "eagle drafter" in speedup.words
    assert "A real model" not in written(tmp_path, [generated("ours", 8)])


def test_outputs_are_claimed_equal_where_the_verifier_says_so():
    whole = lambda **fields: line("compare", **{"identical": 80, "sequences": 80} | fields)
    lines = [
        whole(data="mt_bench", temperature=1, verifier="coupled"),
        whole(data="humaneval", temperature=0, verifier="standard"),
        whole(data="mt_bench", temperature=1, verifier="standard", identical=3),
    ]
    (number,) = headline(lines)
    assert number.value == "160 / 160" and "mt_bench, humaneval, 2 settings" in number.words


def test_every_kind_has_its_table_with_every_column():
    choices = [{"top_k": 4, "batch": 2, "measured": 8, "predicted": 6, "loss": 0.0125}]
    lines = [line(kind) | dict.fromkeys(COLUMNS[kind], "seen") for kind in COLUMNS]
    html = tables([*lines, line("best-gamma", choices=choices), line("piece", name="unshown")])
    assert re.findall("<summary>(.*?) <small>", html) == list(COLUMNS)
    for kind in COLUMNS:
        assert html.count(f"<summary>{kind} ") == 1
    assert html.count("<td>seen</td>") == sum(len(columns) for columns in COLUMNS.values())
    assert "<td>0.0125</td>" in html and "unshown" not in html


class Tags(HTMLParser):
    """Open elements at every table, and what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.around_tables: list[list[str]] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        if tag == "table":
            self.around_tables.append(list(self.open))
        if tag not in ("meta", "link"):
            self.open.append(f"{tag}.{found.get('class')}" if found.get("class") else tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().split(".")[0] == tag


def written(folder: Path, lines: list[dict[str, Any]]) -> str:
    (folder / "lines.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return render(folder)


def test_the_page_is_whole_and_its_tables_scroll_inside_themselves(tmp_path):
    lines = [layer(8, 0.9, ratio={"grouped_mm": 2.0}), generated("ours", 8), generated("vLLM", 8)]
    lines += [line("auto", alpha=0.5, batch=b, against_best=1.0, target="moe") for b in (1, 2)]
    tags = Tags()
    tags.feed(written(tmp_path, lines))
    assert not tags.open, "every element is closed"
    assert len(tags.around_tables) == 3
    assert all("div.scroll" in opened for opened in tags.around_tables)
    # What a picture refers to is in the picture.
    assert all(load.startswith(("#", "data:image/png;base64,")) for load in tags.loads)


def test_what_a_line_says_is_text_and_nothing_else(tmp_path):
    bad = "<script>alert(1)</script>&$style"
    said = line("roofline", f"roofline {bad}", ceilings={"read": bad})
    said["env"] |= {"device": bad, "commit": bad}
    page = written(tmp_path, [said, cell(2.0, target=bad) | {"kind": "predict", "top_k": bad}])
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;$style") >= 5


def test_a_picture_shows_one_run_and_never_a_mixture():
    old = [cell(1.0, gamma=g) for g in (1, 2, 3)]
    new = [cell(2.0, batch=b, gamma=g) for g in (2, 4) for b in (1, 2, 4)]
    for x in new:
        x["env"] = x["env"] | {"commit": "def5678"}
    other = [cell(9.0, gamma=g, target="other") for g in (1, 2)]
    assert _most_gammas([*old, *new, *other]) == old
    assert _one_gamma([*old, *new, *other]) == [x for x in new if x["gamma"] == 2]
    assert _most_gammas(new) == [], "two draft lengths are no map"


def test_tokens_per_second_are_of_one_run_text_and_rounding(tmp_path, monkeypatch):
    old = [generated("ours", b) for b in (1, 8)]
    new = [generated("ours", b, new_tokens=48) for b in (1, 8, 32)]
    rounded = [x | {"int8_activations": True} for x in new]
    for x in (*new, *rounded):
        x["env"] = x["env"] | {"commit": "def5678"}
    longer = [x | {"new_tokens": 64} for x in new]
    assert _largest_of(*TEXTS)([*old, *new, *longer, *rounded]) == [*new, *rounded]
    assert _largest_of("target")([*old, *new]) == new
    labels: list[list[str]] = []
    seen = lambda ax: labels.append(ax.get_legend_handles_labels()[1])
    monkeypatch.setattr(engine, "legend", seen)
    engine.draw_tokens_per_second([*new, *rounded], tmp_path)
    assert labels == [["ours", "ours, int8 activations"]]


@pytest.mark.parametrize("content", [None, "\n"])
def test_no_lines_is_one_clear_line(tmp_path, capsys, content):
    if content:
        (tmp_path / "empty.jsonl").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    assert f"no JSON lines below {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
