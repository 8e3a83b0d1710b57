"""What the students learn from: the target's features over its own text and the corpus.

The features are the target's last hidden states after its final norm; its logits are
``lm_head(features)``. They are computed once and kept in bf16, so that draft and EAGLE head can
pass over them several times.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from training import experts
from training.data import SEED, TokenStream
from training.optim import Budget

ROW = 256
PROMPT = 64
GENERATION_BATCH = 128
TEMPERATURES = (0.0, 0.7, 0.0, 1.0)  # in turn: half of the continuations are greedy
CODE_SHARE = 0.75
BOUNDARY = re.compile(
    r'^[ \t]*(?:async )?def \w+\(.*\)(?: -> .*)?:\n(?:[ \t]+r?"""[^"]*"""\n)?', re.MULTILINE
)


@dataclass
class Rows:
    """Token rows with the target's features: ids int64 [N, ROW], features bf16 [N, ROW, H]."""

    ids: torch.Tensor
    features: torch.Tensor

    def batch(self, count: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw ``count`` rows: ids [count, ROW] and fp32 features [count, ROW, H]."""
        picks = torch.randint(len(self.ids), (count,), generator=random)
        return self.ids[picks], self.features[picks].float()


def load_teacher(path: Path, device: str = "cpu"):
    """The saved bf16 target widened (exactly) to fp32, with the training expert layer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation=experts.register()
    )
    return model.to(device).eval().requires_grad_(False)


def boundary_prompts(
    documents: list[list[int]], tokenizer, length: int = PROMPT
) -> list[list[int]]:
    """Contexts of ``length`` tokens that end after a function's signature and docstring."""
    prompts = []
    for document in documents:
        text = tokenizer.decode(document, clean_up_tokenization_spaces=False)
        for match in BOUNDARY.finditer(text):
            ids = tokenizer.encode(text[max(0, match.end() - 8 * length) : match.end()])[-length:]
            if len(ids) == length:
                prompts.append(ids)
    return prompts


def random_prompts(
    documents: list[list[int]], count: int, random: torch.Generator, length: int = PROMPT
):
    """``count`` contexts of ``length`` tokens cut at random places."""
    long_enough = [d for d in documents if len(d) > length]
    prompts = []
    for i in torch.randint(len(long_enough), (count,), generator=random).tolist():
        start = int(torch.randint(len(long_enough[i]) - length, (1,), generator=random))
        prompts.append(long_enough[i][start : start + length])
    return prompts


def continuations(
    model, prompts: torch.Tensor, temperature: float, new_tokens: int, pad: int
) -> torch.Tensor:
    """The target's own text: prompts [B, P] -> [B, P + new_tokens], padded after its end."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        pad_token_id=pad,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    return torch.nn.functional.pad(
        out, (0, prompts.shape[1] + new_tokens - out.shape[1]), value=pad
    )


@torch.no_grad()
def features_of(model, ids: torch.Tensor) -> torch.Tensor:
    """Features bf16 [B, L, H] of ids [B, L]."""
    with torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda):
        return model.model(input_ids=ids, use_cache=False).last_hidden_state.to(torch.bfloat16)


def build_rows(
    model, tokens, tokenizer, run_dir: Path, budget: Budget, device: str = "cpu"
) -> None:
    """Spend 60 % of the budget on own continuations, the rest on corpus rows; save both."""
    torch.manual_seed(SEED)
    random = torch.Generator().manual_seed(SEED)
    train = tokens["train"]
    pools = {
        "code": boundary_prompts(train["code"], tokenizer)
        + random_prompts(train["code"], 4000, random),
        "prose": random_prompts(train["prose"], 4000, random),
    }
    ids: dict[str, list[torch.Tensor]] = {"own": [], "corpus": []}
    features: dict[str, list[torch.Tensor]] = {"own": [], "corpus": []}
    stream = TokenStream(train, tokenizer.eos_token_id, CODE_SHARE, seed=SEED + 1)
    with tqdm(
        total=100.0, desc="teacher", bar_format="{l_bar}{bar}| {elapsed} {postfix}", mininterval=5
    ) as bar:
        while budget.progress < 1.0:
            own = budget.progress < 0.6
            if own:
                turn = len(ids["own"])
                picks = [
                    pools["code" if u < CODE_SHARE else "prose"]
                    for u in torch.rand(GENERATION_BATCH, generator=random)
                ]
                prompts = [p[int(torch.randint(len(p), (1,), generator=random))] for p in picks]
                temperature = TEMPERATURES[turn % len(TEMPERATURES)]
                rows = continuations(
                    model,
                    torch.tensor(prompts, device=device),
                    temperature,
                    ROW - PROMPT,
                    tokenizer.pad_token_id,
                )
            else:
                rows = stream.batch(32, ROW - 1).to(device)
            kind = "own" if own else "corpus"
            for part in rows.split(32):
                ids[kind].append(part.cpu())
                features[kind].append(features_of(model, part).cpu())
            budget.tokens_done += rows.numel()
            bar.n = 100 * budget.progress
            bar.set_postfix_str(f"{budget.tokens_done / 1e6:.2f}M tokens")
    saved = {k: Rows(torch.cat(ids[k]), torch.cat(features[k])) for k in ids if ids[k]}
    torch.save(
        {k: (r.ids.to(torch.int16), r.features) for k, r in saved.items()}, run_dir / "rows.pt"
    )


class TeacherBatches:
    """Training batches for the students: a share of the target's own text, the rest corpus."""

    def __init__(self, run_dir: Path, own_share: float = 0.6, seed: int = SEED):
        loaded = torch.load(run_dir / "rows.pt")
        self.rows = {k: Rows(ids.long(), features) for k, (ids, features) in loaded.items()}
        self.own_share = own_share
        self.random = torch.Generator().manual_seed(seed)

    def batch(self, count: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """ids [count, ROW], features fp32 [count, ROW, H]."""
        own = round(count * self.own_share)
        parts = [
            self.rows["own"].batch(own, self.random),
            self.rows["corpus"].batch(count - own, self.random),
        ]
        ids, features = (torch.cat(t).to(device) for t in zip(*parts, strict=True))
        return ids, features


def soft_targets(
    features: torch.Tensor, lm_head: torch.Tensor, argmax_weight: float
) -> torch.Tensor:
    """The target's distribution [..., V] mixed with its arg-max: T = 1 and T = 0 acceptance."""
    probs = torch.softmax(features @ lm_head.T, dim=-1)
    best = probs.argmax(-1, keepdim=True)
    mixed = probs.mul_(1 - argmax_weight)
    return mixed.scatter_add_(-1, best, torch.full_like(best, argmax_weight, dtype=mixed.dtype))
