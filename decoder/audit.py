"""The losslessness audit: speculative against autoregressive output, every difference explained.

Where the two must agree token for token (greedy requests, and sampled ones under the coupled
verifier), each first difference is looked at in a teacher-forced fp32 pass of plain transformers
code. If the two tokens are closer there than the model's logits move when the same tokens are
computed in another batch shape, the difference is numeric (a near-tie); otherwise it is
unexplained, and the audit fails.

Where only the law must agree (sampled requests under standard or block verification), the audit is
statistical: it compares how probable the two sets of outputs are under the target. It would notice
a wrong temperature or a wrong context; it does not replace the exact tests of the sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from decoder.errors import UserError
from decoder.requests.outputs import Output
from decoder.requests.params import SamplingParams
from decoder.requests.reader import Prompt, Request

from .sampling import Sampler

if TYPE_CHECKING:
    from decoder.engine.loop import SpeculativeDecoder
    from decoder.model.runner import ModelRunner

_SMALLEST_P_VALUE = 1e-6
_JITTER_BATCHES = 2  # forward passes in verify shape that the jitter is measured on


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first difference of one sequence.

    Attributes:
        index: of the prompt.
        offset: of the first differing output token.
        autoregressive, speculative: the two tokens, ``None`` where that output had ended.
        margin: distance of their scores in the fp32 pass, in units of logits.
        tolerance: twice the measured logit jitter.
    """

    index: int
    offset: int
    autoregressive: int | None
    speculative: int | None
    margin: float
    tolerance: float

    @property
    def kind(self) -> str:
        return "near-tie" if self.margin <= self.tolerance else "unexplained"


@dataclass(frozen=True, slots=True)
class LawCheck:
    """Paired test of the mean log-probability per token, speculative minus autoregressive.

    Attributes:
        sequences: pairs compared.
        difference: mean of the paired differences.
        half_width: of its 95 % confidence interval.
        p_value: two-sided, Student's t.
    """

    sequences: int
    difference: float
    half_width: float
    p_value: float


@dataclass(slots=True)
class Audit:
    """What was compared and what was found.

    Attributes:
        exact: sequences that must be identical.
        identical: of those, how many are.
        tokens: output tokens of these, autoregressive.
        jitter: largest logit difference between (one row, one token) and the verify shape.
        divergences: first differences.
        law: of the sequences that must agree in law only; ``None`` if fewer than two.
    """

    exact: int = 0
    identical: int = 0
    tokens: int = 0
    jitter: float = 0.0
    divergences: list[Divergence] = field(default_factory=list)
    law: LawCheck | None = None

    @property
    def unexplained(self) -> int:
        return sum(d.kind == "unexplained" for d in self.divergences)

    @property
    def passed(self) -> bool:
        return not self.unexplained and (self.law is None or self.law.p_value >= _SMALLEST_P_VALUE)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "passed": self.passed,
            "near_ties": len(self.divergences) - self.unexplained,
            "unexplained": self.unexplained,
            **asdict(self),
            "divergences": [{**asdict(d), "kind": d.kind} for d in self.divergences],
        }


def audit(
    plain: SpeculativeDecoder,
    speculative: SpeculativeDecoder,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    reference: Callable[[], Any],
) -> Audit:
    """Decode ``prompts`` both ways and account for every difference.

    Args:
        plain: decodes the target autoregressively.
        speculative: the same target with a drafter.
        prompts: as for ``generate``; each may carry sampling parameters of its own.
        params: for prompts that do not.
        reference: makes the target in fp32 as transformers runs it, called only when needed.
    """
    requests = [speculative.reader.read(i, p, params) for i, p in enumerate(prompts)]
    coupled = speculative.sampler.verifier == "coupled"
    exact = [i for i, r in enumerate(requests) if coupled or r.params.greedy]
    sampled = sorted(set(range(len(requests))).difference(exact))
    if len(sampled) == 1:
        raise UserError(
            "expected two sampled sequences or more, which are compared in law, got "
            f"{requests[sampled[0]].name} alone; several samples of it will do (--samples)"
        )
    # The requests rather than the prompts: one without a seed has drawn it once for both.
    pairs = list(zip(plain.generate(requests), speculative.generate(requests), strict=True))
    result = Audit(exact=len(exact), tokens=sum(len(pairs[i][0].token_ids) for i in exact))
    different = [i for i in exact if pairs[i][0].token_ids != pairs[i][1].token_ids]
    result.identical = len(exact) - len(different)
    model = None
    if exact:
        gamma = getattr(
            speculative.controller, "max_gamma", len(speculative.stats.alpha_by_position)
        )
        windows = _windows(requests, pairs, different + exact, gamma, speculative.max_batch_size)
        result.jitter = max(
            (logit_jitter(speculative.runner, *window) for window in windows), default=0.0
        )
    if different:
        model = reference()
        for i in different:
            result.divergences.append(_explain(model, requests[i], *pairs[i], 2 * result.jitter))
    if sampled:
        model = model or reference()
        result.law = _compare_laws(model, [(requests[i], *pairs[i]) for i in sampled])
    return result


@torch.inference_mode()
def logit_jitter(runner: ModelRunner, texts: list[list[int]], starts: list[int], Q: int) -> float:
    """Largest logit difference between single steps of one row and one pass over all of them.

    Args:
        runner: of an idle decoder; its cache is overwritten.
        texts: token ids of R rows.
        starts: per row, where the Q tokens to compare begin; ``starts[r] + Q <= len(texts[r])``.
        Q: tokens per row.
    """
    device, B = runner.device, len(texts)
    rows = torch.arange(B, device=device)
    lengths = torch.tensor(starts, device=device)
    padded = torch.zeros(B, max(starts), dtype=torch.int64, device=device)
    for r, (text, start) in enumerate(zip(texts, starts, strict=True)):
        padded[r, :start] = torch.tensor(text[:start])
    ids = torch.tensor([t[s : s + Q] for t, s in zip(texts, starts, strict=True)], device=device)
    positions = lengths[:, None] + torch.arange(Q, device=device)
    runner.prefill(rows, padded, lengths)
    together = runner.forward(ids, rows, positions).logits.float()
    worst = 0.0
    for r in range(B):
        one = slice(r, r + 1)
        runner.prefill(rows[one], padded[one, : starts[r]], lengths[one])
        for q in range(Q):
            step = slice(q, q + 1)
            alone = runner.forward(ids[one, step], rows[one], positions[one, step]).logits.float()
            worst = max(worst, float((alone[0, 0] - together[r, q]).abs().max()))
    return worst


def _windows(
    requests: list[Request],
    pairs: list[tuple[Output, Output]],
    order: list[int],
    gamma: int,
    batch_size: int,
) -> Iterator[tuple[list[list[int]], list[int], int]]:
    """Batches of texts with γ + 1 tokens up to the one that decided the first difference."""
    Q = gamma + 1
    texts, starts = [], []
    for i in dict.fromkeys(order):
        text = requests[i].prompt_ids + pairs[i][0].token_ids
        if len(text) <= Q:
            continue
        offset = _first_difference(*pairs[i])
        if offset is None:
            offset = len(pairs[i][0].token_ids) // 2
        deciding = len(requests[i].prompt_ids) + offset - 1
        texts.append(text)
        starts.append(min(max(deciding - gamma, 1), len(text) - Q))
    for first in range(0, min(len(texts), _JITTER_BATCHES * batch_size), batch_size):
        part = slice(first, first + batch_size)
        yield texts[part], starts[part], Q


def _first_difference(a: Output, b: Output) -> int | None:
    if a.token_ids == b.token_ids:
        return None
    shared = zip(a.token_ids, b.token_ids, strict=False)
    return next(
        (i for i, (x, y) in enumerate(shared) if x != y), min(len(a.token_ids), len(b.token_ids))
    )


@torch.inference_mode()
def _explain(
    model: Any, request: Request, plain: Output, speculative: Output, tolerance: float
) -> Divergence:
    offset = _first_difference(plain, speculative)
    assert offset is not None
    tokens = [
        output.token_ids[offset] if offset < len(output.token_ids) else None
        for output in (plain, speculative)
    ]
    margin = math.inf  # one output ends where the other goes on: no logit explains that
    if tokens[0] is not None and tokens[1] is not None:
        common = plain.token_ids[:offset]
        ids = torch.tensor([request.prompt_ids + common], device=model.device)
        logits = model(input_ids=ids, logits_to_keep=1).logits[:, -1:].float().cpu()
        margin = _margin(logits, request, common, tokens[0], tokens[1])
    return Divergence(plain.index, offset, tokens[0], tokens[1], margin, tolerance)


def _margin(logits: Tensor, request: Request, common: list[int], a: int, b: int) -> float:
    """How far tokens ``a`` and ``b`` are from exchanging places, given ``logits`` ``[1, 1, V]``."""
    sampler = Sampler(1, logits.shape[-1], "cpu", "coupled")
    sampler.admit(0, request.params, request.prompt_ids, request.stop_ids)
    rows = torch.tensor([0])
    if common:
        sampler.commit(rows, torch.tensor([common]), torch.tensor([len(common)]))
    positions = torch.tensor([[len(request.prompt_ids) + len(common)]])
    scores = sampler.scores(logits, rows, positions)[0]
    if bool(scores[[a, b]].isfinite().all()):
        return float((scores[a] - scores[b]).abs())
    # Top-k, top-p or min-p cut one of them: how far is it from the last token kept?
    kept = logits[0, 0][scores.isfinite()].min()
    cut = logits[0, 0][[t for t in (a, b) if not bool(scores[t].isfinite())]]
    return float((kept - cut).max())


@torch.inference_mode()
def _mean_log_prob(model: Any, request: Request, output: Output) -> float:
    """Mean log-probability per output token under ``model``, unprocessed."""
    count = len(output.token_ids)
    ids = torch.tensor([request.prompt_ids + output.token_ids], device=model.device)
    # Some models, Qwen3-Omni's thinker among them, keep all.
    kept = model(input_ids=ids, logits_to_keep=count + 1).logits[0, -count - 1 : -1]
    logits = kept.float()
    chosen = logits.log_softmax(dim=-1).gather(-1, ids[0, -count:, None])
    return float(chosen.mean())


def _compare_laws(model: Any, sampled: list[tuple[Request, Output, Output]]) -> LawCheck:
    from scipy.stats import t as student

    differences = torch.tensor(
        [
            _mean_log_prob(model, request, speculative) - _mean_log_prob(model, request, plain)
            for request, plain, speculative in sampled
        ],
        dtype=torch.float64,
    )
    n, mean = len(differences), float(differences.mean())
    error = float(differences.std()) / math.sqrt(n)
    if error == 0.0:
        return LawCheck(n, mean, 0.0, 1.0 if mean == 0.0 else 0.0)
    p_value = 2 * float(student.sf(abs(mean) / error, n - 1))
    return LawCheck(n, mean, float(student.ppf(0.975, n - 1)) * error, p_value)
