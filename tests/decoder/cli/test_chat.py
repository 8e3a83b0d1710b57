"""Chats and a model's own defaults on the command line, on a tiny model on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hostile.lines import refused
from support.tiny import save_tokenizer, tiny_moe

from decoder.__main__ import main

END, TURN = 5, 6  # of the generation config; the tokenizer ends with w7
TEMPLATE = "{% for m in messages %}w10 {{ m.content }} w11 {% endfor %}"
USER = {"role": "user", "content": "w20 w21"}
CONFIG = {"eos_token_id": [END, TURN], "do_sample": True, "temperature": 0.5, "top_k": 9,
          "max_new_tokens": 3, "num_beams": 2}  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "target"
    tiny_moe(seed=1, layers=1, dtype=torch.float32).save_pretrained(path)
    save_tokenizer(path, [f"w{i}" for i in range(97)])
    (path / "chat_template.jinja").write_text(TEMPLATE)
    (path / "generation_config.json").write_text(json.dumps(CONFIG))
    return path


def run(target: Path, *arguments: str, command: str = "generate") -> int:
    return main([command, "--target", str(target), "--drafter", "none", "--threads", "1",
                 *arguments])  # fmt: skip


def results(capsys: Any) -> tuple[list[dict[str, Any]], str]:
    captured = capsys.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_messages_and_prompts_that_become_messages_are_one(
    target: Path, tmp_path: Path, capsys: Any
) -> None:
    lines = [{"messages": [USER]}, {"prompt": "w20 w21"}, {"prompt": "w10 w20 w21 w11"}]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    greedy = ("--prompts", str(path), "--json", "--temperature", "0")
    assert run(target, *greedy) == 0
    plain = {r["index"]: r for r in results(capsys)[0]}
    assert [plain[i]["stats"]["prompt_tokens"] for i in range(3)] == [4, 2, 4]
    assert plain[0]["token_ids"] == plain[2]["token_ids"]
    assert run(target, *greedy, "--apply-chat-template") == 0
    chats = {r["index"]: r for r in results(capsys)[0]}
    assert [chats[i]["stats"]["prompt_tokens"] for i in range(3)] == [4, 4, 6]
    assert chats[0] == plain[0] and chats[1]["token_ids"] == plain[0]["token_ids"]
    assert chats[1]["digest"] == plain[1]["digest"], "flags are no part of it"


def test_a_template_of_ones_own(target: Path, tmp_path: Path, capsys: Any) -> None:
    text = "w1 {{ messages[0].content }}"
    (tmp_path / "own.jinja").write_text(text)
    chat = ("--prompt", "w20 w21", "--apply-chat-template", "--json", "--chat-template")
    for template in (text, str(tmp_path / "own.jinja")):
        assert run(target, *chat, template) == 0
        (record,) = results(capsys)[0]
        assert record["stats"]["prompt_tokens"] == 3
    assert run(target, *chat, '{{ raise_exception("no\\nsuch role") }}') == 1
    (record,), _ = results(capsys)
    assert record["error"] == "prompt 1: the chat template cannot be applied: no such role"


def test_the_models_defaults_are_said_once_and_give_way_to_flags(
    target: Path, tmp_path: Path, capsys: Any
) -> None:
    prompt = ("--prompt", "w20", "--json", "--ignore-eos", "--generation-config")
    assert run(target, *prompt, "auto") == 0
    (record,), said = results(capsys)
    assert len(record["token_ids"]) == 3 and "seed" in record, "sampled"
    told = "from the generation config: temperature 0.5, top_k 9, max_new_tokens 3; "
    assert said.count(told + "left out of the generation config: num_beams 2\n") == 1
    assert run(target, *prompt, "auto", "--temperature", "0", "--max-tokens", "2") == 0
    (record,), said = results(capsys)
    assert len(record["token_ids"]) == 2 and "seed" not in record
    assert "from the generation config: top_k 9; left" in said
    assert run(target, *prompt, "none", "--max-tokens", "4") == 0
    (record,), said = results(capsys)
    assert len(record["token_ids"]) == 4 and "seed" not in record
    assert "generation config" not in said
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 1}')
    for path in (tmp_path, tmp_path / "generation_config.json"):
        assert run(target, *prompt, str(path)) == 0
        (record,), said = results(capsys)
        assert (
            len(record["token_ids"]) == 1
            and "from the generation config: max_new_tokens 1\n" in said
        )


def test_every_end_of_the_list_ends(target: Path, capsys: Any) -> None:
    for token in (END, TURN):
        bias = json.dumps({str(token): 1e9})
        assert run(target, "--prompt", "w20", "--json", "--logit-bias", bias) == 0
        (record,), _ = results(capsys)
        assert (record["finish_reason"], record["token_ids"], record["text"]) == (
            "eos",
            [token],
            "",
        )


@pytest.mark.parametrize("command", ["compare", "audit"])
def test_commands_that_measure_take_them_too(target: Path, capsys: Any, command: str) -> None:
    arguments = ("--limit", "2", "--apply-chat-template", "--json", "--verifier", "coupled")
    assert run(target, *arguments, command=command) == 0
    (result,), said = results(capsys)
    assert result["identical"] == 2
    assert said.count("from the generation config: temperature 0.5") == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"repetition_penalty": -1.0}, "generation config: repetition_penalty must be"),
        ({"stop_strings": [7]}, "generation config: stop must be a list of strings"),
        ([], "must hold a JSON object, got list"),
    ],
)
def test_a_config_that_cannot_be(
    target: Path, tmp_path: Path, capsys: Any, config: Any, message: str
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    arguments = ["generate", "--target", str(target), "--prompt", "w1"]
    arguments += ["--generation-config", str(tmp_path)]
    refused(arguments, message, tmp_path, capsys)


def test_prompts_cannot_be_chats_without_a_template(
    target: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for file in target.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).write_bytes(file.read_bytes())
    arguments = ["--target", str(folder), "--drafter", "none", "--generation-config", "none"]
    arguments += ["--prompt", "w1", "--apply-chat-template"]
    refused(["generate", *arguments], "needs a tokenizer with a chat template", tmp_path, capsys)
