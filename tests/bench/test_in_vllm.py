"""vLLM with and without our experts as two variants of a run, on engines that answer at once."""

from __future__ import annotations

import pytest

from bench.peers.vllm_generate import VllmSetup, _environment
from bench.runs import in_vllm
from bench.runs.in_vllm import PLUGIN, VLLM, InVllm, agreement


class Model:
    def save_pretrained(self, folder: str) -> None:
        self.folder = folder


class Engine:
    """Counts on from a prompt's first token; with our experts the second prompt goes elsewhere."""

    version = "0.32.0"
    installed = True

    def __init__(self, python: str, setup: VllmSetup, threads: int) -> None:
        self.ours = setup.plugin and self.installed
        self.experts = ["MoesdCpuExperts" if self.ours else "CPUUnquantizedExperts"]
        self.closed = False

    def run(self, prompts, new_tokens):
        tokens = [[prompt[0] + i for i in range(new_tokens)] for prompt in prompts]
        if self.ours:
            tokens[1][2:] = [-1] * (new_tokens - 2)
        return 1.0, tokens

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def _engines(monkeypatch):
    monkeypatch.setattr(in_vllm, "VllmGenerate", Engine)


def test_both_engines_run_and_say_how_their_tokens_agree() -> None:
    vllm = InVllm("python", Model(), 2)
    assert list(vllm.engines) == [VLLM, PLUGIN]
    prompts = [[10], [20]]
    for _ in range(2):
        for name in vllm.engines:
            assert vllm.run(name, prompts, 4)[0] == 1.0
    vllm.run_one_by_one(prompts, 4)
    all_same = {"sequences": 2, "tokens": 8, "of": 8}
    assert vllm.fields(VLLM) == {
        "vllm": "0.32.0",
        "experts": ["CPUUnquantizedExperts"],
        "agrees_again": all_same,
        "agrees_one_by_one": all_same,
    }
    assert vllm.fields(PLUGIN) == {
        "vllm": "0.32.0",
        "experts": ["MoesdCpuExperts"],
        "agrees_with_vllm": {"sequences": 1, "tokens": 6, "of": 8},
    }
    assert vllm.fields("ours") == {}
    vllm.close()
    assert all(engine.closed for engine in vllm.engines.values())


def test_without_the_plugin_there_is_vllm_alone(monkeypatch) -> None:
    monkeypatch.setattr(Engine, "installed", False)
    assert list(InVllm("python", Model(), 1).engines) == [VLLM]


def test_agreement_ends_at_the_first_other_token() -> None:
    tokens = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    others = [[1, 2, 3], [4, 0, 6], [0, 8, 9]]
    assert agreement(tokens, others) == {"sequences": 1, "tokens": 4, "of": 9}


def test_an_engine_gets_all_threads_and_the_openmp_of_its_wheels(tmp_path) -> None:
    python = tmp_path / "bin" / "python"
    plain = _environment(str(python), VllmSetup("model", 1, plugin=True))
    assert plain["MOESD_VLLM"] == "experts" and "LD_PRELOAD" not in plain
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    preloaded = _environment(str(python), VllmSetup("model", 1))
    assert preloaded["MOESD_VLLM"] == "off"
    assert preloaded["LD_PRELOAD"] == str(tmp_path / "lib" / "libiomp5.so")
