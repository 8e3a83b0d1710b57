"""A conversation in place of a text: checked, and rendered by the chat template of a tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .params import shown

FORMS = ("prompt", "token_ids", "messages")  # what a mapping may be a prompt by
# The keys of a conversation, named as in transformers and vLLM.
CHAT_KEYS = ("messages", "tools", "chat_template_kwargs", "continue_final_message")


@dataclass(frozen=True, slots=True)
class Chat:
    """What a chat template is given.

    Attributes:
        messages: each with ``"role"``, ``"content"`` as one text, and whatever else it came with.
        tools: JSON schemas of functions that the model may call.
        template_kwargs: further variables of the template.
        continued: whether the last message is gone on with, instead of answered.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] | None = None
    continued: bool = False

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Chat:
        """Check the values of ``CHAT_KEYS``; ``None`` is as if a key were not there.

        A last message of the assistant's is continued, as transformers' pipelines do, unless
        ``"continue_final_message"`` says otherwise.

        Raises:
            ValueError: what was expected and what came, on one line.
        """
        given = fields.get("messages")
        if not _is_list(given):
            raise ValueError(f"messages must be a list of messages, got {shown(given)}")
        if not given:
            raise ValueError("messages must have at least one message, got none")
        messages = [_message(message, f"messages[{i}]") for i, message in enumerate(given)]
        tools = fields.get("tools")
        if tools is not None:
            if not _is_list(tools) or not all(isinstance(tool, Mapping) for tool in tools):
                raise ValueError(f"tools must be a list of objects, got {shown(tools)}")
            tools = [dict(tool) for tool in tools]
        kwargs = fields.get("chat_template_kwargs")
        if kwargs is not None and not (
            isinstance(kwargs, Mapping) and all(isinstance(key, str) for key in kwargs)
        ):
            raise ValueError(
                f"chat_template_kwargs must be an object of named values, got {shown(kwargs)}"
            )
        continued = fields.get("continue_final_message")
        last = messages[-1]
        if continued is None:
            continued = last["role"] == "assistant" and "tool_calls" not in last
        if not isinstance(continued, bool):
            raise ValueError(
                f"continue_final_message must be true or false, got {shown(continued)}"
            )
        if continued and "content" not in last:
            raise ValueError("continue_final_message needs content in the last message, got none")
        return cls(messages, tools or None, kwargs, continued)

    def rendered(self, tokenizer: Any) -> str:
        """The text that the model reads, special tokens of the template's own included.

        The template is of the model's folder: transformers runs it in a sandbox.

        Raises:
            ValueError: the tokenizer has no template, or variables go by names of its own.
            Exception: whatever the template raises.
        """
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                "the tokenizer has none; --chat-template or its chat_template sets one"
            )
        kwargs = self.template_kwargs or {}
        own = inspect.signature(tokenizer.apply_chat_template).parameters
        for name in kwargs:
            if name in own or name == "messages":
                raise ValueError(
                    f"chat_template_kwargs must leave {shown(name)} alone, got a value"
                )
        text: str = tokenizer.apply_chat_template(
            self.messages,
            tools=self.tools,
            add_generation_prompt=not self.continued,
            continue_final_message=self.continued,
            tokenize=False,
            **kwargs,
        )
        return text


def prompt_form(prompt: Mapping[str, Any]) -> str:
    """Which of ``FORMS`` a mapping has.

    Raises:
        ValueError: none or several of them, or keys of a chat without messages.
    """
    found = [form for form in FORMS if prompt.get(form) is not None]
    if len(found) != 1:
        listed = ", ".join(f'"{form}"' for form in FORMS)
        got = " and ".join(found) or "none"
        if others := [key for key, value in prompt.items() if value is not None and not found]:
            got = f"none beside {shown(others)}"
        raise ValueError(f"expected exactly one of {listed}, got {got}")
    beside = [key for key in CHAT_KEYS if prompt.get(key) is not None]
    if beside and found != ["messages"]:
        raise ValueError(f"{beside[0]} is read with messages only, got {found[0]}")
    return found[0]


def as_chat(prompt: Any) -> Any:
    """A text prompt, or a mapping with one, as a message of the user's; anything else as it is."""
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    if not isinstance(prompt, Mapping) or not isinstance(text := prompt.get("prompt"), str):
        return prompt
    rest = {key: value for key, value in prompt.items() if key != "prompt"}
    return {**rest, "messages": [{"role": "user", "content": text}]}


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(
            f'{name} must be an object with "role" and "content", got {shown(message)}'
        )
    out = {key: value for key, value in message.items() if value is not None}
    role = out.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f'{name} must have a "role" that is text, got {shown(role)}')
    if "content" in out:
        out["content"] = _text(out["content"], name)
    elif "tool_calls" not in out:
        raise ValueError(f'{name} must have "content", got none')
    return out


def _text(content: Any, name: str) -> str:
    """Content that is text, or a list of parts that are; as vLLM joins them."""
    if isinstance(content, str):
        return content
    if not _is_list(content):
        raise ValueError(f'{name} must have a "content" of text, got {shown(content)}')
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise ValueError(
                f'{name} must have parts of the type "text" in its "content", '
                f"got {shown(part if kind is None else kind)}"
            )
        if not isinstance(part.get("text"), str):
            raise ValueError(f'{name} must have "text" in each part, got {shown(part)}')
        texts.append(part["text"])
    return "\n".join(texts)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
