"""``--parallel``: what is wrong with it is one line, said by rank 0 alone."""

from __future__ import annotations

import pytest

from decoder.__main__ import main
from decoder.cli.parallel_options import is_silent

_TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
_ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
_GENERATE = ["generate", "--target", "embedded", "--prompt", "x"]
_EXPERT = [*_GENERATE, "--parallel", "expert"]

REFUSED = [
    (_EXPERT, {}, "--parallel expects processes of torchrun"),
    (_EXPERT, _TORCHRUN, "got no MASTER_ADDR in the environment"),
    (_EXPERT, {**_TORCHRUN, **_ADDRESS, "WORLD_SIZE": "1"}, "at least 2 ranks, got 1"),
    (_GENERATE, _TORCHRUN, "torchrun has started 2 processes; expected --parallel expert|tensor"),
    (["plan", "--target", "embedded"], _TORCHRUN, "torchrun has started 2 processes"),
    ([*_GENERATE, "--parallel", "pipeline"], _TORCHRUN, "invalid choice: 'pipeline'"),
    ([*_EXPERT, "--batch-invariant"], _TORCHRUN, "--batch-invariant is of one process"),
    ([*_EXPERT, "--int8-activations"], _TORCHRUN, "--int8-activations is of one process"),
    ([*_EXPERT, "--parallel-timeout", "0"], _TORCHRUN, "--parallel-timeout"),
]


@pytest.mark.parametrize(("arguments", "environment", "message"), REFUSED)
def test_refused(
    arguments: list[str],
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in {**_TORCHRUN, **_ADDRESS}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "environment", "silent"),
    [
        (_EXPERT, {**_TORCHRUN, "RANK": "1"}, True),
        (_EXPERT, {"RANK": "1", "WORLD_SIZE": "2"}, True),
        ([*_GENERATE, "--parallel=expert"], {"RANK": "1", "WORLD_SIZE": "2"}, True),
        (_GENERATE, {**_TORCHRUN, "RANK": "1"}, True),
        (_GENERATE, {"RANK": "1", "WORLD_SIZE": "2"}, False),  # a job's own variables
        (_EXPERT, _TORCHRUN, False),
        (_EXPERT, {}, False),
    ],
)
def test_who_is_silent(
    arguments: list[str],
    environment: dict[str, str],
    silent: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in _TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_silent(arguments) == silent
