"""The dense model's own conversations: prompts it invents, and its answers to them.

An instruction-tuned model that is given only the opening of a user's turn writes a user's question
(Xu et al. 2024, "Magpie", arXiv 2406.08464); given that question it writes the answer. Code
questions are opened with a few words. Functions of the training sources, cut after signature and
docstring, are continued as plain text.
"""

import json
from pathlib import Path

import torch

from training.checkpoint import cut_half_line, load_checkpoint, save_checkpoint
from training.teacher import BOUNDARY

SEED = 21
CHUNK = 256  # conversations between two writes
BATCH = 64
MAX_PROMPT, MAX_ANSWER = 128, 256
# Of every eight conversations.
KINDS = ("chat", "code", "chat", "code", "chat", "completion", "chat", "code")
TEMPERATURES = (0.0, 0.7, 0.0, 1.0)  # in turn: half of the answers are greedy
OPENINGS = (
    "Write a Python function",
    "Write a Python function that takes a list of",
    "Complete the following Python function.\n\n```python\ndef",
    "Implement a Python class",
    "Write a short Python program that",
    "Explain what this Python code does.\n\n```python\n",
    "Fix the bug in this Python code:\n\n```python\ndef",
    "How do I",
)


class Writer:
    """The dense model at both sides of a conversation."""

    def __init__(self, dense, tokenizer, sources: list[str]):
        from decoder import SpeculativeDecoder

        self.tokenizer = tokenizer
        self.decoder = SpeculativeDecoder(
            dense,
            gamma=0,
            tokenizer=tokenizer,
            max_batch_size=BATCH,
            max_length=2 * (MAX_PROMPT + MAX_ANSWER),
        )
        self.functions = _functions(sources)
        marked = tokenizer.apply_chat_template([{"role": "user", "content": "\0"}], tokenize=False)
        self.opening = marked.split("\0")[0]

    def write(self, first: int) -> list[dict]:
        """Conversations ``first`` to ``first + CHUNK``, some of which come to nothing."""
        chunk = range(first, first + CHUNK)
        kinds = [KINDS[i % len(KINDS)] for i in chunk]
        openings = {
            i: OPENINGS[i // len(KINDS) % len(OPENINGS)] if kind == "code" else ""
            for i, kind in zip(chunk, kinds, strict=True)
            if kind != "completion"
        }
        prompts: dict[int, list[int]] = {i: [] for i in chunk}
        for i, question in self._questions(openings).items():
            turn = [{"role": "user", "content": question}]
            prompts[i] = self.tokenizer.apply_chat_template(
                turn, add_generation_prompt=True, return_dict=False
            )
        for i, kind in zip(chunk, kinds, strict=True):
            if kind == "completion":
                text = self.functions[i * 7919 % len(self.functions)]
                prompts[i] = self._encode(text)[-MAX_PROMPT:]
        return self._answers({i: (KINDS[i % len(KINDS)], p) for i, p in prompts.items() if p})

    def _questions(self, openings: dict[int, str]) -> dict[int, str]:
        from decoder import SamplingParams

        params = [
            SamplingParams(temperature=1.0, top_p=0.95, max_new_tokens=MAX_PROMPT, seed=SEED + i)
            for i in openings
        ]
        prompts = [self._encode(self.opening + opening) for opening in openings.values()]
        outputs = self.decoder.generate(prompts, params)
        return {
            i: opening + output.text
            for (i, opening), output in zip(openings.items(), outputs, strict=True)
            if output.finish_reason == "eos"
        }

    def _answers(self, prompts: dict[int, tuple[str, list[int]]]) -> list[dict]:
        from decoder import SamplingParams

        params = [
            SamplingParams(
                temperature=TEMPERATURES[i // len(KINDS) % len(TEMPERATURES)],
                max_new_tokens=MAX_ANSWER,
                seed=SEED + i,
            )
            for i in prompts
        ]
        outputs = self.decoder.generate([p for _, p in prompts.values()], params)
        return [
            {
                "index": i,
                "kind": kind,
                "prompt_tokens": len(prompt),
                "token_ids": prompt + output.token_ids,
            }
            for (i, (kind, prompt)), output in zip(prompts.items(), outputs, strict=True)
        ]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def write_answers(writer: Writer, path: Path, budget) -> None:
    """Append conversations to the JSON-lines file ``path`` until the budget is spent.

    What earlier parts have spent of it is in a file beside ``path``.
    """
    cut_half_line(path)
    done, spent = read_answers(path), path.with_suffix(".pt")
    if spent.exists():
        state = load_checkpoint(spent)
        budget.tokens_done, budget.seconds_before = state["tokens"], state["seconds"]
    first = (max((line["index"] for line in done), default=-1) // CHUNK + 1) * CHUNK
    while budget.progress < 1.0:
        torch.manual_seed(SEED + first)
        written = writer.write(first)
        with path.open("a") as file:  # one write: an interrupted chunk leaves at most one half line
            file.write("".join(json.dumps(line) + "\n" for line in written))
        budget.tokens_done += sum(len(line["token_ids"]) for line in written)
        save_checkpoint({"tokens": budget.tokens_done, "seconds": budget.seconds}, spent)
        first += CHUNK


def read_answers(path: Path) -> list[dict]:
    """The conversations in ``path``; a last line cut short by an interruption is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _functions(sources: list[str]) -> list[str]:
    """Texts that end after a function's signature and docstring."""
    return [
        text[max(0, match.end() - 6 * MAX_PROMPT) : match.end()]
        for text in sources
        for match in BOUNDARY.finditer(text)
    ]
