"""Conversations: what may be one, and what a model reads of it, begin-of-text once."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from decoder import SamplingParams
from decoder.errors import UserError
from decoder.requests.chat import as_chat
from decoder.requests.reader import RequestReader

WORDS = ["<unk>", "<bos>", "<end>", "user", "assistant", "system", "tool", ":", "a", "b", "c", "T"]
# As Llama's: begins with begin-of-text, which the tokenizer adds to texts by itself.
TEMPLATE = """{{ bos_token }}{% if tools %} T{% endif %}{% for m in messages -%}
{% if m.role == "b" %}{{ raise_exception("roles must\\nalternate") }}{% endif -%}
{{ " " + m.role + " : " + (m.content or "T") + " " + eos_token }}
{%- endfor %}{% if word %} {{ word }}{% endif -%}
{% if add_generation_prompt %} assistant :{% endif %}"""


def make_tokenizer(template: str | None) -> Any:
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", WORDS.index("<bos>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<end>", unk_token="<unk>",
        chat_template=template,
    )  # fmt: skip


READER = RequestReader(make_tokenizer(TEMPLATE), len(WORDS), 20, frozenset({99}))
USER = {"role": "user", "content": "a b"}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
REPLY = {"role": "assistant", "content": "c"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
ASKED = "<bos> user : a b <end>"


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ({"messages": [USER]}, f"{ASKED} assistant :"),
        ({"messages": (USER,)}, f"{ASKED} assistant :"),
        ({"messages": [{"role": "user", "content": PARTS}]}, f"{ASKED} assistant :"),
        ({"messages": [{**USER, "name": None}], "tools": []}, f"{ASKED} assistant :"),
        ({"messages": [USER, REPLY, USER]}, None),
        ({"messages": [USER, REPLY]}, f"{ASKED} assistant : c"),
        (
            {"messages": [USER, REPLY], "continue_final_message": False},
            f"{ASKED} assistant : c <end> assistant :",
        ),
        ({"messages": [USER], "continue_final_message": True}, "<bos> user : a b"),
        ({"messages": [USER, CALL]}, f"{ASKED} assistant : T <end> assistant :"),
        ({"messages": [USER], "tools": [{"type": "function"}]}, f"<bos> T {ASKED[6:]} assistant :"),
        ({"messages": [USER], "chat_template_kwargs": {"word": "c"}}, f"{ASKED} c assistant :"),
        (as_chat("a b"), f"{ASKED} assistant :"),
        (as_chat({"prompt": "a b", "temperature": 0.5}), f"{ASKED} assistant :"),
    ],
)
def test_what_the_model_reads(prompt: dict[str, Any], text: str | None) -> None:
    request = READER.read(0, {**prompt, "id": "x"}, SamplingParams())
    if text is None:
        assert str(request.prompt).count("<bos>") == 1
    else:
        assert " ".join(str(request.prompt).split()) == text
    words = str(request.prompt).split()
    assert [WORDS[i] for i in request.prompt_ids] == words and words.count("<bos>") == 1
    assert request.params.temperature == prompt.get("temperature", 0)


def test_a_text_gets_its_begin_of_text_from_the_tokenizer() -> None:
    assert [WORDS[i] for i in READER.read(0, "a b", SamplingParams()).prompt_ids] == [
        "<bos>",
        "a",
        "b",
    ]


def test_the_end_of_the_models_configuration_and_of_the_tokenizer_both_count() -> None:
    reader = RequestReader(make_tokenizer(None), len(WORDS), 20, frozenset({7, 8, 99}))
    assert reader.read(0, "a", SamplingParams()).stop_ids == {7, 8, WORDS.index("<end>")}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"messages": "hi"}, "messages must be a list of messages, got 'hi'"),
        ({"messages": {"role": "user"}}, "messages must be a list of messages, got {"),
        ({"messages": []}, "messages must have at least one message, got none"),
        ({"messages": ["hi"]}, 'messages[0] must be an object with "role" and "content", got'),
        ({"messages": [USER, [USER]]}, "messages[1] must be an object"),
        ({"messages": [{"content": "a"}]}, 'messages[0] must have a "role" that is text, got None'),
        ({"messages": [{**USER, "role": 5}]}, 'a "role" that is text, got 5'),
        ({"messages": [{**USER, "role": ""}]}, "a \"role\" that is text, got ''"),
        ({"messages": [{"role": "user"}]}, 'messages[0] must have "content", got none'),
        ({"messages": [{**USER, "content": None}]}, 'messages[0] must have "content", got none'),
        ({"messages": [{**USER, "content": 3}]}, 'must have a "content" of text, got 3'),
        (
            {"messages": [{**USER, "content": {"text": "a"}}]},
            'must have a "content" of text, got {',
        ),
        ({"messages": [{**USER, "content": ["a"]}]}, 'parts of the type "text" in its "content"'),
        (
            {"messages": [USER, {**USER, "content": [{"type": "image_url", "image_url": {}}]}]},
            'messages[1] must have parts of the type "text" in its "content", got \'image_url\'',
        ),
        ({"messages": [{**USER, "content": [{"type": "text"}]}]}, '"text" in each part, got {'),
        ({"messages": [USER], "tools": {"a": 1}}, "tools must be a list of objects, got {"),
        ({"messages": [USER], "tools": ["f"]}, "tools must be a list of objects, got ['f']"),
        ({"messages": [USER], "chat_template_kwargs": [1]}, "an object of named values, got [1]"),
        ({"messages": [USER], "continue_final_message": "no"}, "must be true or false, got 'no'"),
        ({"messages": [CALL], "continue_final_message": True}, "needs content in the last message"),
        ({"messages": [USER], "prompt": "a"}, "got prompt and messages"),
        ({"messages": None, "token_ids": None}, "got none"),
        ({"prompt": "a", "tools": []}, "tools is read with messages only, got prompt"),
        ({"messages": [USER], "max_tokens": 3}, "unknown sampling parameter 'max_tokens'"),
        ({"messages": [{**USER, "content": "a\ud800"}]}, "cannot be tokenized: "),
        ({"messages": [{**USER, "content": "a " * 30}]}, "leave no room in a context of 20"),
        (
            {"messages": [{**USER, "role": "b"}]},
            "the chat template cannot be applied: roles must alternate",
        ),
        (
            {"messages": [USER], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            "chat_template_kwargs must leave 'chat_template' alone, got a value",
        ),
        (
            {"messages": [USER], "chat_template_kwargs": {"add_generation_prompt": False}},
            "must leave 'add_generation_prompt' alone",
        ),
        ({"messages": [USER], "chat_template_kwargs": {"messages": []}}, "leave 'messages' alone"),
    ],
)
def test_what_is_wrong_is_said_with_its_name(prompt: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        READER.read(4, {**prompt, "id": "x"}, SamplingParams())
    said = str(caught.value)
    assert said.startswith("prompt 'x': ") and message in said
    assert said.isprintable() and len(said) < 300


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has none; --chat-template"),
        ("{% for %}", "cannot be applied: "),
        ("{{ messages[7].role }}", "cannot be applied: "),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("", "expected at least one token, got an empty prompt"),
    ],
)
def test_a_template_that_cannot_be_applied_costs_its_prompt(
    template: str | None, message: str
) -> None:
    reader = RequestReader(make_tokenizer(template), len(WORDS), 20, frozenset())
    with pytest.raises(UserError) as caught:
        reader.read(0, {"messages": [USER]}, SamplingParams())
    assert message in str(caught.value) and str(caught.value).isprintable()


def test_a_chat_needs_a_tokenizer() -> None:
    with pytest.raises(UserError, match="prompt 0: messages need a tokenizer, got none"):
        RequestReader(None, 9, 20, frozenset()).read(0, {"messages": [USER]}, SamplingParams())


def test_only_texts_become_a_users_message() -> None:
    for prompt in ([1, 2], {"token_ids": [1]}, {"messages": [USER]}, {"prompt": None}):
        assert as_chat(prompt) is prompt
