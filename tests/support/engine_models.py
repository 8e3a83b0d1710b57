"""Tiny random models and a tokenizer for the engine's tests; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB, EOS = 97, 5


def tiny_moe(seed: int = 0, layers: int = 2, dtype: torch.dtype = torch.float64) -> Any:
    """A random Qwen3-MoE; fp64 makes greedy comparisons independent of batch shapes."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    return model.to(dtype).eval()


def reference_greedy(model: Any, prompt: list[int], count: int, eos: bool = True) -> list[int]:
    """The model's own greedy continuation, one full forward per token and no cache at all."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if eos and ids[-1] == EOS:
            break
    return ids[len(prompt) :]


def ragged_prompts(count: int, seed: int = 0, longest: int = 12) -> list[list[int]]:
    """Random prompts of lengths 1..longest, the first of length 1."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    lengths[0] = 1
    return [torch.randint(6, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def decoder(target: Any, drafter: Any = None, gamma: Any = 3, **options: Any) -> Any:
    """A decoder of four rows on transformers' code alone."""
    from decoder import SpeculativeDecoder
    from decoder.drafters import DraftOptions, build_drafter

    options = {"max_batch_size": 4, "kernels": False, "attention": "portable"} | options
    made = build_drafter(drafter, target, options=DraftOptions(kernels=options["kernels"]))
    return SpeculativeDecoder(target, made, gamma, **options)


def save_tokenizer(path: Path, words: list[str]) -> None:
    """A tokenizer on disk that knows these words, separated by spaces; the first is for others."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0]).save_pretrained(path)


class LetterTokenizer:
    """Ids to characters one to one, as much of a tokenizer as the engine uses."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % VOCAB for c in text]}

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        kept = [i for i in ids if i > EOS or not skip_special_tokens]
        return "".join(chr(0x4E00 + i) for i in kept)  # distinct, multi-byte characters


class NoisyOracle:
    """Drafts the target's own continuation, wrong every ``period``-th absolute position."""

    name = "oracle"
    hidden_layers = None

    def __init__(self, continuations: dict[tuple[int, ...], list[int]], period: int) -> None:
        self.continuations = continuations
        self.period = period
        self._texts: dict[int, list[int]] = {}
        self.rounds: list[int] = []

    def bind(self, runner: Any, sampler: Any, max_gamma: int) -> None:
        pass

    def admit(self, rows: Any, token_ids: Any, lengths: Any, hidden: Any) -> None:
        for row, ids, n in zip(rows.tolist(), token_ids.tolist(), lengths.tolist(), strict=True):
            self._texts[row] = ids[:n] + self.continuations[tuple(ids[:n])]

    def propose(self, state: Any, gamma: int) -> Any:
        from decoder.round import Draft

        self.rounds.append(gamma)
        drafts = []
        for row, length in zip(state.rows.tolist(), state.host_lengths, strict=True):
            text = self._texts[row][length + 1 : length + 1 + gamma]
            text += [7] * (gamma - len(text))
            positions = range(length + 1, length + 1 + gamma)
            drafts.append(
                [
                    (token + 1) % VOCAB if position % self.period == 0 else token
                    for token, position in zip(text, positions, strict=True)
                ]
            )
        return Draft(torch.tensor(drafts), None, torch.full_like(state.lengths, gamma))

    def commit(self, state_before: Any, verdict: Any, hidden: Any) -> None:
        pass

    def release(self, rows: Any) -> None:
        pass
