"""A scheduler of vLLM's that asks us for the draft length, on a stand-in for vLLM."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from support.vllm import fake

import moesd_vllm


@pytest.fixture(autouse=True)
def vllm(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "vllm.moesd")
    return fake.fake_vllm(monkeypatch)


def config(
    method: str | None = "draft_model",
    longest: int = 4,
    table: list[tuple[int, int, int]] | None = None,
    device: str = "cpu",
    ahead: bool = False,
    replicas: int = 1,
    parallel: bool = False,
    own_proposer: bool = False,
) -> SimpleNamespace:
    """As much of a ``VllmConfig`` as is read."""
    speculative = SimpleNamespace(
        method=method,
        num_speculative_tokens=longest,
        num_speculative_tokens_per_batch_size=table,
        parallel_drafting=parallel,
        use_gemma4_mtp=lambda: False,
        use_step3p5_mtp=lambda: own_proposer,
    )
    return SimpleNamespace(
        speculative_config=None if method is None else speculative,
        parallel_config=SimpleNamespace(data_parallel_size=replicas),
        device_config=SimpleNamespace(device_type=device),
        scheduler_config=SimpleNamespace(async_scheduling=ahead),
    )


EACH = [(1, 1, 0), (2, 2, 2), (3, 64, 6)]


@pytest.mark.parametrize(
    ("given", "kind", "lengths"),
    [
        (config(), "GammaScheduler", [0, 1, 2, 3, 4]),
        (config("ngram", longest=2), "GammaScheduler", [0, 1, 2]),
        (config(table=EACH), "GammaScheduler", [0, 2, 4]),
        (config("eagle3", table=EACH, device="cuda", ahead=True), "AsyncGammaScheduler", [0, 2, 4]),
    ],
)
def test_lengths_are_chosen_where_vllm_can_change_them(caplog, given, kind, lengths) -> None:
    made = moesd_vllm.gamma_scheduler(vllm_config=given, block_size=16)
    assert type(made).__name__ == kind
    assert made.arguments == {"vllm_config": given, "block_size": 16}
    assert made.dynamic_sd_lookup[3] in lengths
    assert f"of {', '.join(map(str, lengths))} tokens drafted by" in caplog.text


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (config(None), "no --speculative-config is given"),
        (config("medusa"), "got medusa, whose length vLLM cannot change"),
        (config("suffix"), "got suffix, whose"),
        (config("eagle3", parallel=True), "got eagle3 with parallel drafting, whose"),
        (config("mtp", own_proposer=True), "this model's own proposer cannot do without drafts"),
        (config(table=[(1, 8, 0), (9, 64, 0)]), "per_batch_size lists 0 alone"),
        (config(replicas=2), "ranks of data parallelism would draft different numbers"),
        (config(device="cuda", ahead=True), "num_speculative_tokens_per_batch_size does not list"),
    ],
)
def test_what_cannot_change_its_length_keeps_vllms_scheduler(caplog, given, reason) -> None:
    made = moesd_vllm.gamma_scheduler(vllm_config=given)
    ahead = given.scheduler_config.async_scheduling
    assert type(made) is (fake.AsyncScheduler if ahead else fake.Scheduler)
    assert made.dynamic_sd_lookup is None
    assert len(caplog.messages) == 1 and reason in caplog.messages[0]


def test_another_version_keeps_vllms_scheduler(monkeypatch, caplog) -> None:
    fake.fake_vllm(monkeypatch, "0.31.2")
    made = moesd_vllm.gamma_scheduler(vllm_config=config())
    assert type(made) is fake.Scheduler
    assert "expected vLLM 0.32.x, found 0.31.2: draft lengths stay its own" in caplog.text


class Steps:
    """In place of ``StepGamma``: what a scheduler tells of each step."""

    def __init__(self) -> None:
        self.told: list = []
        self.controller = SimpleNamespace(explain=lambda: "")

    def ended(self, *step) -> None:
        self.told.append(step)

    def ended_otherwise(self) -> None:
        self.told.append("otherwise")


def step(scheduled: dict[str, tuple[int, int]], sampled: dict[str, list[int]]) -> tuple:
    """vLLM's outputs of a step: sequence -> tokens scheduled and drafts among them, and sampled."""
    output = SimpleNamespace(
        total_num_scheduled_tokens=sum(n for n, _ in scheduled.values()),
        num_scheduled_tokens={name: n for name, (n, _) in scheduled.items()},
        scheduled_spec_decode_tokens={
            k: [7] * drafts for k, (_, drafts) in scheduled.items() if drafts
        },
    )
    names = sorted(sampled)
    indices = {name: row for row, name in enumerate(names)}
    return output, SimpleNamespace(
        req_id_to_index=indices, sampled_token_ids=[sampled[name] for name in names]
    )


def test_steps_that_decode_are_told_with_what_was_accepted(monkeypatch) -> None:
    made = moesd_vllm.gamma_scheduler(vllm_config=config())
    made._gamma = steps = Steps()
    clock = iter([10.0, 12.0, 15.0, 19.0, 24.0, 30.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    run = made.update_from_output
    assert run(*step({"b": (5, 0), "a": (9, 0)}, {"a": [1], "b": [1]})) == "vLLM's outputs"
    run(*step({"b": (3, 2), "a": (1, 0)}, {"a": [4], "b": [5, 6, 7]}))
    run(*step({}, {}))  # nothing scheduled, nothing to tell
    run(*step({"b": (3, 2), "c": (8, 0)}, {"b": [5], "c": [1]}))  # a prompt among them
    made.unfinished = False
    run(*step({"b": (4, 3), "c": (1, 0)}, {"b": [5, 6], "c": [1]}))
    made.unfinished = True
    run(*step({"d": (1, 0)}, {"d": [1]}))  # after a pause, whose length says nothing
    run(*step({"d": (2, 1)}, {"d": [1]}))
    assert steps.told == [
        "otherwise",
        (2.0, [2, 0], [2, 0]),
        "otherwise",
        (4.0, [3, 0], [1, 0]),
        "otherwise",
        (6.0, [1], [0]),
    ]
