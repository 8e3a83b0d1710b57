"""``--offload-experts`` and ``--offload-budget``: what they say, and a run with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.hostile.folders import whole
from support.offload import PAGES, experts_bytes

from decoder.__main__ import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole(tmp_path_factory.mktemp("model") / "model", **PAGES)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--offload-experts"], "--offload-experts needs --offload-budget"),
        (["--offload-budget", "1"], "read with --offload-experts only"),
        (["--offload-experts", "nowhere", "--offload-budget", "1"], "folder, got 'nowhere'"),
        (["--offload-experts", "cpu", "--offload-budget", "1"], "for a GPU, got device 'cpu'"),
        (["--offload-experts", "--offload-budget", "x"], "expected a number"),
        (["--offload-experts", "--offload-budget", "-1"], "expected a number"),
        (["--offload-experts", "--offload-budget", "nan"], "expected a number"),
        (["--offload-experts", "--offload-budget", "0"], "must be at least 0.00059 GB"),
        (["--offload-experts", "--offload-budget", "1", "--dtype", "bf16"], "torch.bfloat16"),
    ],
)
def test_what_does_not_work_is_one_line(folder, capsys, flags, said):
    common = ["generate", "--target", str(folder), "--prompt", "w1 w2", "--device", "cpu"]
    assert main([*common, *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_run_says_what_it_read(folder, capsys):
    """And decodes what the whole model does, with draft lengths of its own choice."""
    common = ["generate", "--target", str(folder), "--prompt", "w1 w2", "--prompt", "w9"]
    common += ["--max-new-tokens", "8", "--gamma", "2", "--json", "--device", "cpu"]
    assert main(common) == 0
    wanted = capsys.readouterr().out
    common[common.index("--gamma") + 1] = "auto"
    budget = ["--offload-experts", "--offload-budget", str(0.6 * experts_bytes(folder) / 1e9)]
    assert main(common + budget) == 0
    printed = capsys.readouterr()
    texts = [[json.loads(x)["text"] for x in out.splitlines()] for out in (wanted, printed.out)]
    assert texts[0] == texts[1]
    assert " in memory, " in printed.err
    assert " GB read, waited " in printed.err
