"""Do target and draft mean the same thing by a token id?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decoder.errors import UserError


def fit_vocab(logits: Tensor, vocab_size: int) -> Tensor:
    """Cut or pad the last axis to ``vocab_size``; padded ids are impossible (-inf)."""
    have = logits.shape[-1]
    if have >= vocab_size:
        return logits[..., :vocab_size]
    return torch.nn.functional.pad(logits, (0, vocab_size - have), value=-torch.inf)


def vocabulary_mismatch(target: Any, draft: Any) -> str | None:
    """Why two tokenizers cannot share token ids, or ``None`` when they can.

    Every id that both know must stand for the same token text. Ids that only one knows are fine
    when they lie beyond the other's last id: embedding tables are padded, and target families add
    special tokens at the end. The draft simply never proposes those.
    """
    ours = {index: token for token, index in target.get_vocab().items()}
    theirs = {index: token for token, index in draft.get_vocab().items()}
    common = min(max(ours), max(theirs)) + 1
    for index in range(common):
        if ours.get(index) != theirs.get(index):
            return (
                f"token {index} is {ours.get(index)!r} for the target "
                f"and {theirs.get(index)!r} for the draft"
            )
    return None


def require_same_vocabulary(
    target_size: int, draft_size: int, target_tokenizer: Any | None, draft_tokenizer: Any | None
) -> None:
    """Check that draft token ids can be handed to the target.

    Raises:
        UserError: the tokenizers disagree, or sizes differ and there are no tokenizers to ask.
    """
    if target_tokenizer is not None and draft_tokenizer is not None:
        if (reason := vocabulary_mismatch(target_tokenizer, draft_tokenizer)) is not None:
            raise UserError(
                f"the draft model's vocabulary must be the target's, but {reason}; "
                "an n-gram, self or EAGLE drafter needs no second vocabulary"
            )
    elif target_size != draft_size:
        raise UserError(
            f"target and draft have {target_size} and {draft_size} tokens; pass both tokenizers so "
            "that the common ids can be compared"
        )
