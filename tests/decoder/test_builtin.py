"""The built-in models: which is the default, what they are asked, what is known of their drafts."""

import json
from types import SimpleNamespace

import pytest

from decoder import embedded, smol
from decoder.builtin import BUILTIN, builtin_prompts, default_target, stated_alpha
from decoder.drafters import DRAFTERS
from decoder.smol.recipe import Recipe


@pytest.mark.parametrize(("why", "name"), [(None, "smol"), ("not installed", "embedded")])
def test_the_real_model_is_the_default_where_it_can_be_had(monkeypatch, why, name):
    monkeypatch.setattr(smol, "unavailable", lambda: why)
    assert default_target() == name in BUILTIN


@pytest.mark.parametrize(("template", "other"), [(None, "prose"), ("{{ messages }}", "chat")])
def test_prompts_are_questions_where_there_is_a_template(template, other):
    prompts = builtin_prompts(SimpleNamespace(chat_template=template))
    assert {p.kind for p in prompts} == {"code", other}
    assert sum(p.kind == "code" for p in prompts) >= 8 and len(prompts) >= 12
    for prompt in prompts:
        asked = {"messages": [{"role": "user", "content": prompt.text}]}
        assert prompt.prompt == (asked if template else prompt.text)


def test_alphas_are_those_of_the_cards(monkeypatch, tmp_path):
    assert stated_alpha("embedded", "independent", "code", 0.0) == 0.968
    card = (embedded.ASSETS.parent / "MODEL_CARD.md").read_text()
    assert "0.968" in card
    assert {*embedded.ALPHA} <= {*DRAFTERS}
    monkeypatch.setattr(smol, "shipped", lambda: Recipe(None, assets=tmp_path))
    assert stated_alpha("smol", "eagle", "chat", 1.0) is None
    alpha = {"eagle": {"chat": {"0": 0.7, "1": 0.5}}}
    (tmp_path / "upcycle.json").write_text(json.dumps({"alpha": alpha}))
    assert stated_alpha("smol", "eagle", "chat", 1.0) == 0.5
    for known in (
        ("smol", "eagle", "code", 1.0),
        ("smol", "eagle", "chat", 0.7),
        ("a", "b", "c", 0),
    ):
        assert stated_alpha(*known) is None
