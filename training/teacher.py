"""What the students learn from: the target over its own text and over the corpus.

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
from training.checkpoint import load_checkpoint, save_checkpoint
from training.data import SEED, TokenStream
from training.optim import Budget

ROW = 512
PROMPT = 128
GENERATION_BATCH = 64
SLICE = 16  # rows per pass without a cache
TOP = 32
ARGMAX_WEIGHT = 0.3
TEMPERATURES = (0.0, 0.7, 0.0, 1.0)  # in turn: half of the continuations are greedy
CODE_SHARE = 0.75
OWN_SHARE = 0.6  # of a student's batch, the target's own text
SHARES = {"code": CODE_SHARE, "prose": 1 - CODE_SHARE}
OWN_TIME = 0.8
BOUNDARY = re.compile(
    r'^[ \t]*(?:async )?def \w+\(.*\)(?: -> .*)?:\n(?:[ \t]+r?"""[^"]*"""\n)?', re.MULTILINE
)


@dataclass
class Rows:
    """Token rows and what the target says at each place: features, TOP likeliest tokens."""

    ids: torch.Tensor  # [N, ROW] int16 as stored, int64 as drawn
    features: torch.Tensor  # [N, ROW, H] bf16 as stored, fp32 as drawn
    top_ids: torch.Tensor  # [N, ROW, TOP] int16 as stored, int64 as drawn; likeliest first
    top_probs: torch.Tensor  # [N, ROW, TOP] fp16 as stored, fp32 as drawn; sum to one

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The four tensors in order."""
        return self.ids, self.features, self.top_ids, self.top_probs

    def draw(self, count: int, random: torch.Generator) -> "Rows":
        """``count`` random rows, widened."""
        picks = torch.randint(len(self.ids), (count,), generator=random)
        ids, features, top_ids, top_probs = (t[picks] for t in self.tensors())
        return Rows(ids.long(), features.float(), top_ids.long(), top_probs.float())

    @staticmethod
    def joined(parts: list["Rows"]) -> "Rows":
        """One ``Rows`` of all rows in ``parts``."""
        return Rows(*(torch.cat(t) for t in zip(*(p.tensors() for p in parts), strict=True)))


def load_teacher(path: Path, device: str = "cpu"):
    """The saved bf16 target widened (exactly) to fp32, with the training expert layer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        experts_implementation=experts.register(),
        trust_remote_code=False,
        use_safetensors=True,
    )
    torch.nn.Module.to(model, device)
    return model.eval().requires_grad_(False)


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


def load_writer(path: Path, device: str = "cpu"):
    """A decoder that continues texts of up to ROW tokens with the saved bf16 target."""
    from decoder import SpeculativeDecoder
    from decoder.model.loading import load_model

    return SpeculativeDecoder(
        load_model(path, device=device),
        gamma=0,
        max_batch_size=GENERATION_BATCH,
        max_length=ROW,
    )


def continuations(
    writer,
    prompts: list[list[int]],
    temperature: float,
    new_tokens: int,
    pad: int,
    seed: int = SEED,
) -> torch.Tensor:
    """The target's own text: B prompts of P tokens -> ``[B, P + new_tokens]``, padded after its
    end."""
    from decoder import SamplingParams

    params = [
        SamplingParams(temperature=temperature, max_new_tokens=new_tokens, seed=seed + i)
        for i in range(len(prompts))
    ]
    outputs = writer.generate(prompts, params)
    rows = [prompt + out.token_ids for prompt, out in zip(prompts, outputs, strict=True)]
    length = len(prompts[0]) + new_tokens
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows])


@torch.no_grad()
def annotate(model, ids: torch.Tensor) -> Rows:
    """What the target says over ids int64 ``[B, L]``, as stored."""
    with torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda):
        features = model.model(input_ids=ids, use_cache=False).last_hidden_state
        probs = model.lm_head(features).float().softmax(-1)
    top_probs, top_ids = probs.topk(TOP)
    top_probs = top_probs / top_probs.sum(-1, keepdim=True)
    stored = ids.short(), features.to(torch.bfloat16), top_ids.short(), top_probs.half()
    return Rows(*(t.cpu() for t in stored))


def build_rows(
    model, writer, tokens, tokenizer, run_dir: Path, budget: Budget, device: str = "cpu"
) -> None:
    """Spend OWN_TIME of the budget on own continuations, the rest on the corpus; save both."""
    torch.manual_seed(SEED)
    random = torch.Generator().manual_seed(SEED)
    train = tokens["train"]
    pools = {
        "code": boundary_prompts(train["code"], tokenizer)
        + random_prompts(train["code"], 4000, random),
        "prose": random_prompts(train["prose"], 4000, random),
    }
    rows: dict[str, list[Rows]] = {"own": [], "corpus": []}
    stream = TokenStream(train, SHARES, tokenizer.eos_token_id, seed=SEED + 1)
    with tqdm(
        total=100.0, desc="teacher", bar_format="{l_bar}{bar}| {elapsed} {postfix}", mininterval=5
    ) as bar:
        # Some of both, however little time: the students draw from both.
        while budget.progress < 1.0 or not all(rows.values()):
            own = budget.progress < OWN_TIME or not rows["own"]
            if own:
                done = len(rows["own"]) * SLICE
                temperature = TEMPERATURES[done // GENERATION_BATCH % len(TEMPERATURES)]
                prompts = draw_prompts(pools, random)
                ids = continuations(
                    writer,
                    *(prompts, temperature, ROW - PROMPT, tokenizer.pad_token_id),
                    seed=SEED + done,
                )
            else:
                ids = stream.batch(SLICE, ROW - 1)
            parts = ids.to(device).split(SLICE)
            rows["own" if own else "corpus"] += [annotate(model, part) for part in parts]
            budget.tokens_done += ids.numel()
            bar.n = 100 * budget.progress
            bar.set_postfix_str(f"{budget.tokens_done / 1e6:.2f}M tokens")
    joined = {kind: Rows.joined(parts).tensors() for kind, parts in rows.items() if parts}
    save_checkpoint(joined, run_dir / "rows.pt")


def draw_prompts(pools: dict[str, list[list[int]]], random: torch.Generator) -> list[list[int]]:
    """GENERATION_BATCH prompts, code or prose by CODE_SHARE, of PROMPT tokens each."""
    is_code = torch.rand(GENERATION_BATCH, generator=random) < CODE_SHARE
    picked = [pools["code" if code else "prose"] for code in is_code.tolist()]
    return [p[int(torch.randint(len(p), (1,), generator=random))] for p in picked]


class TeacherBatches:
    """Training batches for the students: a share of the target's own text, the rest corpus."""

    def __init__(self, run_dir: Path):
        rows = load_checkpoint(run_dir / "rows.pt")
        self.rows = {kind: Rows(*t) for kind, t in rows.items()}
        self.random = torch.Generator().manual_seed(SEED)

    def batch(self, count: int, device: str = "cpu") -> Rows:
        """``count`` rows on ``device``, widened."""
        own = round(count * OWN_SHARE)
        counts = {"own": own, "corpus": count - own}
        drawn = Rows.joined([self.rows[k].draw(n, self.random) for k, n in counts.items()])
        return Rows(*(t.to(device) for t in drawn.tensors()))


def distillation_loss(
    logits: torch.Tensor, top_ids: torch.Tensor, top_probs: torch.Tensor, real: torch.Tensor
) -> torch.Tensor:
    """Cross entropy against the target's TOP tokens, sharpened towards its arg-max.

    The distribution trains acceptance when sampling, the arg-max acceptance when greedy.

    Args:
        logits: the student's, ``[B, L, V]`` fp32.
        top_ids, top_probs: the target's, ``[B, L, TOP]``.
        real: bool ``[B, L]``, the places that count.
    """
    weights = top_probs * (1 - ARGMAX_WEIGHT)
    weights[..., 0] += ARGMAX_WEIGHT
    loss = logits.logsumexp(-1) - (weights * logits.gather(-1, top_ids)).sum(-1)
    return (loss * real).sum() / real.sum()


@torch.no_grad()
def agreement(logits: torch.Tensor, top_ids: torch.Tensor, real: torch.Tensor) -> float:
    """Share of the real places where student and target have the same likeliest token."""
    return ((logits.argmax(-1) == top_ids[..., 0]) & real).sum().item() / real.sum().item()
