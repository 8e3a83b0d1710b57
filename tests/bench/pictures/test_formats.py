"""Pictures over weight formats, on made lines: which are drawn, and what is not mixed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.page.questions import answers
from bench.pictures import formats
from bench.pictures.gallery import draw_all
from bench.pictures.kernels import _by_layer, draw_peer_ratios
from bench.runs.cells import group_cells

ENV = {"device": "A CPU", "commit": "abc", "command": "python -m bench kernels"}
BYTES = {None: 2.0, "q8_0": 1.0625, "q4_0": 0.5625}


def layer(stored: str | None, batch: int, gamma: int, **fields: Any) -> dict[str, Any]:
    """A line of a machine that reads a byte of an expert in 1 s and multiplies it in 0.1 s."""
    tokens = batch * (gamma + 1)
    floor = max(BYTES[stored] * 8, 0.1 * tokens)
    line = {"kind": "kernel", "shape": [8, 2, 64, 64], "dtype": "bfloat16", "routing": "uniform"}
    line |= {"backend": "auto", "B": batch, "gamma": gamma, "T": tokens, "floor_s": floor}
    line |= {"seconds": {"moesd": dict.fromkeys(("median", "p20", "p80"), 2 * floor + 1)}}
    line |= {"of_roof": 0.5, "ratio": {}, "env": ENV} | fields
    return line if stored is None else line | {"weight_format": stored}


def sweep(*stored: str | None) -> list[dict[str, Any]]:
    return [layer(s, b, g) for s in stored for b in (8, 16, 32, 64) for g in (0, 2, 4)]


@pytest.fixture
def figures(monkeypatch):
    """What was plotted, by the name of the picture: labels and the dashed and solid lines."""
    plotted = {}

    def save(figure, out, name):
        (ax,) = figure.axes
        plotted[name] = {
            (line.get_color(), line.get_linestyle()): (line.get_label(), line.get_xydata())
            for line in ax.lines
            if len(line.get_xdata()) > 2
        }
        return out / name

    monkeypatch.setattr(formats, "save", save)
    return plotted


def test_a_curve_per_format_and_a_dashed_roofline_each(figures, tmp_path):
    drawn = formats.draw_layer_formats(sweep("q4_0", None, "q8_0"), tmp_path)
    words = "layer-formats-8,2,64,64 bfloat16 uniform-gamma"
    assert [path.name for path in drawn] == [f"{words}2", f"{words}4"]
    for name, lines in figures.items():
        gamma = int(name[-1])
        labels = [label for (_, style), (label, _) in lines.items() if style == "-"]
        assert labels == ["plain", "q4_0", "q8_0"], "what the others are held against comes first"
        for stored in (None, "q4_0", "q8_0"):
            (color,) = {c for (c, _), (label, _) in lines.items() if label == (stored or "plain")}
            for batch, efficiency in lines[color, "--"][1]:
                step, verified = (max(BYTES[stored] * 8, 0.1 * batch * n) for n in (1, gamma + 1))
                assert efficiency == pytest.approx(step / verified)
            measured = dict(lines[color, "-"][1].tolist())
            assert sorted(measured) == [8, 16, 32, 64]
            step, verified = (2 * max(BYTES[stored] * 8, 0.8 * n) + 1 for n in (1, gamma + 1))
            assert measured[8] == pytest.approx(step / verified)


def test_one_format_alone_is_no_comparison_and_a_last_measurement_counts(figures, tmp_path):
    assert formats.draw_layer_formats(sweep("q4_0"), tmp_path) == []
    other = [layer("q8_0", b, g, dtype="float16") for b in (8, 16, 32) for g in (0, 2)]
    assert formats.draw_layer_formats([*sweep("q4_0"), *other], tmp_path) == []
    again = layer("q4_0", 8, 2, seconds={"moesd": {"median": 100.0}})
    formats.draw_layer_formats([*sweep(None, "q4_0"), again], tmp_path)
    (picture,) = (lines for name, lines in figures.items() if name.endswith("2"))
    (curve,) = (xy for label, xy in picture.values() if label == "q4_0")
    assert curve[0].tolist() == [8, pytest.approx((2 * 4.5 + 1) / 100)]


def test_a_model_is_one_whatever_its_file_is_called(figures, tmp_path):
    lines = [
        {"target": target, "batch": batch, "gamma": 2, "top_k": 2, "env": ENV}
        | {"target_efficiency": 1 / batch, "weight_format": stored}
        for target, stored in (("a/smol-bf16.gguf", "plain"), ("smol-q4_0.gguf", "q4_0"))
        for batch in (1, 2, 4)
    ]
    (path,) = formats.draw_model_formats(lines, tmp_path)
    assert path.name == "formats-smol K=2-gamma2"
    assert [label for label, _ in figures[path.name].values()] == ["plain", "q4_0"]


def test_weights_that_share_other_scales_are_told_apart():
    stored = layer("q4_0", 8, 0) | {"weight_format": "int4"}
    lines = [stored | {"group": group} for group in (32, 128, None)]
    names = [name.split(" uniform ")[1] for name in _by_layer(lines)]
    assert names == ["int4", "int4 group 128", "int4 row"]
    assert [formats.stored_words(line) for line in lines] == names


def test_formats_are_not_mixed_elsewhere(tmp_path, monkeypatch):
    lines = [layer(s, b, 0, ratio={"grouped_mm": 3.0}) for s in BYTES for b in (8, 16)]
    assert draw_peer_ratios([x for x in lines if "weight_format" in x], tmp_path) == []
    monkeypatch.setattr("bench.runs.cells._cells", lambda group: group)
    cells = [{"target": "moe", "weight_format": s} for s in ("plain", "q8_0", "q8_0")]
    assert list(map(len, group_cells(cells))) == [1, 2]


def test_the_page_and_the_plot_command_ask_for_it(tmp_path):
    lines = sweep(None, "q4_0")
    (asked,) = (a for a in answers(lines) if "layer with fewer bits" in a.question.words)
    assert asked.picture.startswith("<svg")
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    names = {path.name for path in draw_all([tmp_path / "lines.jsonl"], tmp_path / "out")}
    assert {f"layer-formats-8_2_64_64-bfloat16-uniform-gamma{g}.png" for g in (2, 4)} < names
    assert any(name.startswith("layer-time") and name.endswith("q4_0.png") for name in names)
