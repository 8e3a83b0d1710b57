"""The numbers of the model card: held-out loss, acceptance of draft and EAGLE head."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from training.data import SEED
from training.eagle import Eagle
from training.teacher import boundary_prompts, continuations, random_prompts

WINDOW = 512
LOSS_TOKENS = 60_000  # of a kind of document, the first
PROMPT = 128
NEW_TOKENS = 256
PROMPTS = 48
EAGLE_DEPTHS = 4


@dataclass
class Text:
    """The target's own continuations of held-out prompts, its logits and features."""

    ids: torch.Tensor  # int64 [B, L]
    features: torch.Tensor  # fp32 [B, L, H]
    logits: torch.Tensor  # fp32 [B, L, V]
    generated: torch.Tensor  # bool [B, L]: this position's token was produced by the target

    def first(self) -> int:
        """Position of the first generated token."""
        return self.ids.shape[1] - NEW_TOKENS


@torch.no_grad()
def held_out_loss(model, documents: list[list[int]], eos: int) -> float:
    """Mean cross entropy (nats per token) over the joined documents, by WINDOW tokens."""
    stream = torch.tensor([t for d in documents for t in (*d, eos)][:LOSS_TOKENS])
    rows = stream[: (len(stream) - 1) // WINDOW * WINDOW + 1].unfold(0, WINDOW + 1, WINDOW)
    losses = []
    for part in rows.to(model.device).split(8):
        logits = model(input_ids=part[:, :-1], use_cache=False).logits.float()
        losses.append(
            F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        )
    return torch.cat(losses).mean().item()


def held_out_prompts(tokens, tokenizer) -> dict[str, list[list[int]]]:
    """Up to PROMPTS contexts per kind: code at function boundaries, prose anywhere."""
    random = torch.Generator().manual_seed(SEED)
    code = boundary_prompts(tokens["held_out"]["code"], tokenizer, PROMPT)
    order = torch.randperm(len(code), generator=random)[:PROMPTS].tolist()
    return {
        "code": [code[i] for i in order],
        "prose": random_prompts(tokens["held_out"]["prose"], PROMPTS, random, PROMPT),
    }


@torch.no_grad()
def target_text(model, writer, prompts: list[list[int]], temperature: float, pad: int) -> Text:
    """Let the target continue the prompts, then read its features and logits in one pass."""
    ids = continuations(writer, prompts, temperature, NEW_TOKENS, pad).to(model.device)
    features = model.model(input_ids=ids, use_cache=False).last_hidden_state
    generated = ids != pad
    generated[:, :-NEW_TOKENS] = False
    return Text(ids, features, model.lm_head(features), generated)


def overlap(target_logits, draft_logits, temperature: float) -> torch.Tensor:
    """Acceptance probability of a draft token: arg-max agreement at T = 0, else overlap."""
    if temperature == 0:
        return (target_logits.argmax(-1) == draft_logits.argmax(-1)).float()
    target_probs = (target_logits / temperature).softmax(-1)
    draft_probs = (draft_logits / temperature).softmax(-1)
    return torch.minimum(target_probs, draft_probs).sum(-1)


@torch.no_grad()
def draft_alpha(draft, text: Text, temperature: float) -> float:
    """Mean acceptance of the draft's next token along the target's own continuation."""
    draft_logits = draft(input_ids=text.ids, use_cache=False).logits.float()
    accepted = overlap(text.logits[:, :-1], draft_logits[:, :-1], temperature)
    return accepted[text.generated[:, 1:]].mean().item()


@torch.no_grad()
def eagle_alpha(head: Eagle, lm_head: torch.Tensor, text: Text, temperature: float) -> list[float]:
    """Acceptance at draft depth 1, 2, ...; from depth 2 on the features are its own."""
    embeds = F.embedding(text.ids[:, 1:], lm_head)
    alphas = []
    for predicted in head.depths(embeds, text.features[:, :-1], EAGLE_DEPTHS):
        accepted = overlap(text.logits[:, 1:-1], predicted[:, :-1] @ lm_head.T, temperature)
        alphas.append(accepted[text.generated[:, 2:]].mean().item())
    return alphas


def distinct_trigrams(text: Text) -> float:
    """Different 3-grams over all 3-grams per continuation: near 0 for degenerate loops."""
    ratios = []
    for row, generated in zip(text.ids, text.generated, strict=True):
        ids = row[generated].tolist()
        trigrams = list(zip(ids, ids[1:], ids[2:], strict=False))
        if trigrams:
            ratios.append(len(set(trigrams)) / len(trigrams))
    return sum(ratios) / len(ratios)


def evaluate(
    target, writer, draft, heads: dict[str, Eagle], tokens, tokenizer
) -> dict[str, float | list[float]]:
    """Everything the model card states, as one flat dictionary."""
    results: dict[str, float | list[float]] = {}
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    for kind, documents in tokens["held_out"].items():
        loss = held_out_loss(target, documents, eos)
        chars = sum(len(tokenizer.decode(d)) for d in documents)
        per_char = loss * sum(map(len, documents)) / chars / math.log(2)
        results |= {f"target loss {kind}": loss, f"target bits/char {kind}": per_char}
        if draft is not None:
            results[f"draft loss {kind}"] = held_out_loss(draft, documents, eos)
    for kind, prompts in held_out_prompts(tokens, tokenizer).items():
        for temperature in (0.0, 1.0):
            text = target_text(target, writer, prompts, temperature, pad)
            name = f"{kind} T={temperature:g}"
            results[f"tokens {name}"] = int(text.generated.sum())
            results[f"distinct 3-grams {name}"] = distinct_trigrams(text)
            if draft is not None:
                results[f"draft alpha {name}"] = draft_alpha(draft, text, temperature)
            for kind_of_head, head in heads.items():
                results[f"{kind_of_head} alpha {name}"] = eagle_alpha(
                    head, target.lm_head.weight, text, temperature
                )
    return results
