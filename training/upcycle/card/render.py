"""The model card, from the record of training and evaluation alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .evaluate import STARVED, WINDOW, difference, shares, total_variation

TEMPLATE = Path(__file__).with_name("card.md")
K = 2  # of the model as built
OUTSIDE_LIMIT = 0.02  # of the dense model's loss
BARS = "▁▂▃▄▅▆▇█"
CODE, CHAT = "code", "chat"  # the domains whose loads are compared
NAMES = {"independent": "dense draft", "eagle": "EAGLE-3", "self": "self, K = 1"}


class Text(NamedTuple):
    """One text's losses: of the dense model, and of the target by experts per token."""

    part: str
    domain: str
    tokens: int
    dense: list[float]
    moe: dict[int, list[float]]


def render(record: Mapping[str, Any]) -> str:
    """The card in Markdown.

    Args:
        record: ``training`` and ``evaluation`` as ``python -m training.upcycle.card`` writes them.
    """
    evaluation = record["evaluation"]
    losses, accepted = (
        [cell for cell in evaluation["cells"] if cell["kind"] == kind]
        for kind in ("loss", "acceptance")
    )
    texts = _texts(losses)
    settings = {key: accepted[0][key] for key in ("gamma", "rows", "new_tokens")}
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        settings,
        stages=_stages(record["training"]),
        sources=_sources(record["training"]),
        versions=", ".join(f"{name} {value}" for name, value in evaluation["versions"].items()),
        device={"cpu": "on a CPU"}.get(evaluation["device"], "on a GPU"),
        window=WINDOW,
        losses=_losses(texts),
        top_ks=_top_ks(texts),
        verdicts=_verdicts(texts, accepted),
        load=_load(losses),
        acceptance=_acceptance(accepted),
        trigrams=_trigrams(accepted),
        lossless=_lossless(accepted),
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _stages(training: Mapping[str, Any]) -> str:
    rows = [
        (stage, f"{facts['tokens']:,}", facts["minutes"], facts["device"], facts.get("seed", ""))
        for stage, facts in training.items()
        if "tokens" in facts
    ]
    return table(("stage", "tokens", "minutes", "device", "seed"), rows)


def _sources(training: Mapping[str, Any]) -> str:
    sources = training["sources"]
    versions = ", ".join(f"{name} {version}" for name, version in sources["versions"].items())
    return f"{versions} (SHA-256 over all documents: `{sources['sha256']}`)"


def _texts(cells: Sequence[Mapping[str, Any]]) -> list[Text]:
    """The texts in the order in which they were measured."""
    texts: dict[tuple[str, str], Text] = {}
    for cell in cells:
        key = cell["part"], cell["domain"]
        text = texts.setdefault(key, Text(*key, cell["tokens"], [], {}))
        if cell["top_k"] is None:
            text.dense.extend(cell["losses"])
        else:
            text.moe[cell["top_k"]] = cell["losses"]
    return list(texts.values())


def _losses(texts: Sequence[Text]) -> str:
    rows = []
    for text in texts:
        mean, error = difference(text.moe[K], text.dense)
        dense = fmean(text.dense)
        name = f"{text.domain}, {text.part.replace('_', ' ')}"
        rows.append(
            (name, f"{text.tokens:,}", f"{dense:.3f}", f"{dense + mean:.3f}",
             f"{mean:+.3f} ± {error:.3f}", f"{mean / dense:+.1%}")
        )  # fmt: skip
    return table(("text", "tokens", "dense", "MoE", "difference", "relative"), rows)


def _top_ks(texts: Sequence[Text]) -> str:
    held_out = [text for text in texts if text.part == "held_out"]
    top_ks = sorted(held_out[0].moe)
    rows = [(text.domain, *(f"{fmean(text.moe[k]):.3f}" for k in top_ks)) for text in held_out]
    return table(("text", *(f"K = {k}" for k in top_ks)), rows)


def _verdicts(texts: Sequence[Text], accepted: Sequence[Mapping[str, Any]]) -> str:
    """What the numbers say of each claim, whether it holds or not."""

    def relative(part: str) -> dict[str, float]:
        found = [text for text in texts if text.part == part]
        return {t.domain: difference(t.moe[K], t.dense).mean / fmean(t.dense) for t in found}

    fewer = [difference(t.moe[1], t.moe[K]) for t in texts if t.part == "held_out"]
    alphas = [c["alpha"] for c in accepted if c["drafter"] == "self"]
    held_out, outside = relative("held_out"), relative("outside")
    claims = [
        ("held-out loss not above the dense model's", _worst(held_out),
         max(held_out.values()) <= 0),
        (f"loss outside at most {OUTSIDE_LIMIT:.0%} above the dense model's", _worst(outside),
         max(outside.values()) <= OUTSIDE_LIMIT),
        ("K = 1 worse than K = 2 on every held-out text, by more than three standard errors",
         f"least {min(each.mean for each in fewer):+.3f} nats",
         all(each.mean > 3 * each.error for each in fewer)),
        ("its own draft with one expert is not always right",
         f"largest α {max(alphas):.3f}", max(alphas) < 1),
    ]  # fmt: skip
    return "\n".join(
        f"- {'Held' if held else '**Missed**'}: {claim} ({numbers})."
        for claim, numbers, held in claims
    )


def _worst(relative: Mapping[str, float]) -> str:
    domain = max(relative, key=lambda name: relative[name])
    return f"worst {relative[domain]:+.1%}, {domain}"


def _load(cells: Sequence[Mapping[str, Any]]) -> str:
    halves = {c["domain"]: torch.tensor(c["load"]) for c in cells if c["top_k"] == K}  # [2, L, E]
    both = {domain: counts.sum(0) for domain, counts in halves.items()}  # [L, E]
    every = shares(torch.stack(list(both.values())).sum(0))
    apart = total_variation(both[CODE], both[CHAT])
    chance = total_variation(*halves[CODE])
    rows = [
        (layer, *_spread(every[layer], apart[layer], chance[layer]),
         *(_bars(shares(both[domain][layer])) for domain in (CODE, CHAT)))
        for layer in range(len(every))
    ]  # fmt: skip
    head = ("layer", "least", "median", "most", "starved", "code ↔ chat", "code ↔ code", CODE, CHAT)
    return table(head, [*rows, ("all", *_spread(every, apart.mean(), chance.mean()), "", "")])


def _spread(load: Tensor, apart: Tensor, chance: Tensor) -> list[object]:
    numbers = [f"{value:.2f}" for value in (load.min(), load.median(), load.max())]
    starved = int((load < STARVED).sum())
    return [*numbers, starved, f"{apart:.2f}", f"{chance:.2f}"]


def _bars(load: Tensor) -> str:
    heights = (load * len(BARS) / 2).long().clamp(max=len(BARS) - 1)
    return f"`{''.join(BARS[i] for i in heights.tolist())}`"


def _acceptance(cells: Sequence[Mapping[str, Any]]) -> str:
    domains = list(dict.fromkeys(cell["domain"] for cell in cells))
    found: dict[tuple[str, float, str], dict[str, str]] = {}
    for cell in cells:
        key = cell["drafter"], cell["temperature"], cell["verifier"]
        alpha = "-" if cell["alpha"] is None else f"{cell['alpha']:.3f}"
        text = f"{alpha} · {cell['tokens_per_round']:.2f}"
        found.setdefault(key, {})[cell["domain"]] = text
    rows = [
        (NAMES.get(drafter, drafter), f"{temperature:g}", verifier if temperature else "any",
         *(each[domain] for domain in domains))
        for (drafter, temperature, verifier), each in found.items()
    ]  # fmt: skip
    return table(("draft", "T", "verifier", *(f"{d}: α · tokens" for d in domains)), rows)


def _trigrams(cells: Sequence[Mapping[str, Any]]) -> str:
    found: dict[tuple[str, float], list[float]] = {}
    for cell in cells:
        if cell["trigrams"] is not None:
            found.setdefault((cell["domain"], cell["temperature"]), []).append(cell["trigrams"])
    return ", ".join(
        f"{domain} {fmean(values):.2f} at T = {temperature:g}"
        for (domain, temperature), values in found.items()
    )


def _lossless(cells: Sequence[Mapping[str, Any]]) -> str:
    """Whether outputs that must not depend on the draft did not."""
    exact = [c for c in cells if c["temperature"] == 0 or c["verifier"] == "coupled"]
    outputs: dict[tuple[str, float, str | None], list[str]] = {}
    for cell in exact:  # of one run: another processor rounds otherwise
        key = cell["domain"], cell["temperature"], cell.get("run")
        outputs.setdefault(key, []).append(cell["digest"])
    compared = [digests for digests in outputs.values() if len(digests) > 1]
    same = sum(len(set(digests)) == 1 for digests in compared)
    return (
        "Greedy outputs, and sampled ones under `coupled`, were the same tokens whatever drafted "
        f"in {same} of {len(compared)} comparisons of drafts that were measured together."
    )
