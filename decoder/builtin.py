"""The two models that come with the project: their names, which is the default, their prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from . import embedded, smol
from .embedded import prompts as texts
from .requests.chat import as_chat
from .requests.reader import Prompt
from .smol import prompts as questions

SMOL, EMBEDDED = "smol", "embedded"


class Builtin(Protocol):
    """What both packages offer."""

    def target_path(self) -> Path: ...

    def draft_of(
        self,
        drafter: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = "auto",
        kernels: bool = False,
    ) -> Path | None: ...

    def stated_alphas(self) -> dict[str, Any]: ...


BUILTIN: dict[str, Builtin] = {SMOL: smol, EMBEDDED: embedded}


def default_target() -> str:
    """The real model, or the small pair where it cannot be had."""
    return EMBEDDED if smol.unavailable() else SMOL


class BuiltinPrompt(NamedTuple):
    """A prompt that comes with the project.

    Attributes:
        kind: ``"code"``, ``"chat"`` or ``"prose"``.
        text: what a reader is shown of it.
        prompt: what is decoded: the text, or a chat that begins with it.
    """

    kind: str
    text: str
    prompt: Prompt


def builtin_prompts(tokenizer: Any) -> list[BuiltinPrompt]:
    """Questions where the tokenizer has a chat template to ask them in, else texts to complete."""
    if getattr(tokenizer, "chat_template", None):
        kinds = {"code": questions.CODE_PROMPTS, "chat": questions.CHAT_PROMPTS}
        return [BuiltinPrompt(k, text, as_chat(text)) for k in kinds for text in kinds[k]]
    kinds = {"code": texts.CODE_PROMPTS, "prose": texts.PROSE_PROMPTS}
    return [BuiltinPrompt(k, text, text) for k in kinds for text in kinds[k]]


def stated_alpha(target: str, drafter: str, kind: str, temperature: float) -> float | None:
    """The acceptance rate that a built-in model's card states, ``None`` where it states none.

    Args:
        target: name of the model; of any other, nothing is known.
        drafter: its name in ``DRAFTERS``.
        kind: of prompt.
    """
    table = BUILTIN[target].stated_alphas() if target in BUILTIN else {}
    alpha: float | None = table.get(drafter, {}).get(kind, {}).get(f"{temperature:g}")
    return alpha
