"""What holds for a family of models: its experts, its decoding, and the page that lists them all.

``make families`` writes ``docs/families.md``; the tests hold each line of it to what is found.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from support.decoding import decoder

import moesd_kernels
from decoder import SamplingParams
from decoder.drafters import ReplayDrafter
from decoder.errors import UserError
from moesd_kernels.hooks.experts import spec_of

from .building import CLASSES, FAMILY_NAMES, FIRST_ORDINARY, NOT_BUILT, VOCAB, build

PAGE = Path(__file__).parents[3] / "docs" / "families.md"
EXACT, REFUSED = "exact", "refused"
FUSED, OWN_CODE, DENSE = "fused", "own code", "none"
NEW_TOKENS, LENGTHS = 9, (9, 1, 14)
_HEADING = "| family | class | experts | decoder | reason |"


class Finding(NamedTuple):
    """Attributes: ``experts`` is ``FUSED``, ``"handed over: why"``, ``OWN_CODE`` or ``DENSE``;
    ``decoding`` is ``EXACT`` or ``REFUSED``, with the ``reason``."""

    name: str
    experts: str
    decoding: str
    reason: str = ""

    def line(self) -> str:
        cells = _family(self.name), self.name, self.experts, self.decoding, self.reason
        return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def finding(name: str) -> Finding:
    """What is found for a class of ``FAMILY_NAMES``; greedy decoding and experts are held to
    transformers' own on the way.

    Raises:
        AssertionError: neither exact nor refused, or experts that change the logits.
    """
    experts, model = _experts(name), build(name)
    drafts = ReplayDrafter(0.7)
    try:
        made = [_decoder(model, drafts, kernels=True), _decoder(build(name), drafts, kernels=False)]
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        return Finding(name, experts, REFUSED, _short(name, message))
    original = build(name)
    own = {prompt: _generated(original, prompt) for prompt in _prompts()}
    drafts.recordings.update(own)
    for each in made:
        outputs = each.generate([list(p) for p in own], SamplingParams(max_new_tokens=NEW_TOKENS))
        assert [list(o.token_ids) for o in outputs] == list(own.values()), name
    return Finding(name, experts, EXACT)


def _decoder(model: Any, drafts: ReplayDrafter, kernels: bool) -> Any:
    """Two rows for three prompts: ragged, and one is used again."""
    attention = "auto" if kernels else "portable"
    return decoder(
        model, drafts, 3, max_batch_size=2, max_length=48, kernels=kernels, attention=attention
    )


@torch.no_grad()
def _experts(name: str) -> str:
    """Who computes the experts of an accelerated model, whose logits must be what they were."""
    model = build(name)
    ids = torch.tensor([list(_prompts()[0])])
    own = model(input_ids=ids, use_cache=False).logits
    moesd_kernels.accelerate(model)
    ours = model(input_ids=ids, use_cache=False).logits
    assert own.isfinite().all(), name
    worst = float((ours - own).norm() / (own - own.mean()).norm())
    assert worst < 1e-4, f"{name}: accelerated logits are off by {worst:.1e}"
    modules = [m for m in model.modules() if hasattr(m, "_apply_gate") or hasattr(m, "has_gate")]
    if not modules:
        has_experts = any("expert" in name for name, _ in model.named_modules())
        return OWN_CODE if has_experts else DENSE
    refusals = sorted({spec_of(module).refusal or "" for module in modules})
    return FUSED if refusals == [""] else f"handed over: {'; '.join(filter(None, refusals))}"


def _prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(5)
    draw = lambda n: torch.randint(FIRST_ORDINARY, VOCAB, (n,), generator=generator)
    return [tuple(draw(n).tolist()) for n in LENGTHS]


def _generated(model: Any, prompt: tuple[int, ...]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


def _short(name: str, message: str) -> str:
    """A refusal without what all of them say, and without numbers that rounding decides."""
    reason = message.removeprefix(f"{name} ")
    reason = re.sub(r"^cannot be decoded over a ragged cache: .*?, got ", "", reason)
    return re.sub(r" by [\d.]+%", "", reason).partition(";")[0]


_INTRODUCTION = """\
# Model families

Made with transformers {version} by `make families`; the tests hold every line to what they find.
These are all classes that transformers maps to causal language modelling, and all that generate
text in a modelling file with its experts interface, each as a tiny random model in fp32 on a CPU.

**{exact} exact**: greedy speculative output of ragged rows equals transformers' `generate` token
for token, with our kernels and without. **{refused} refused** in one line before anything is
decoded, for the reason given. Other sizes and options of a family are checked whenever a decoder is
built (`decoder/model/probe.py`).

Experts: **{fused} fused**, {handed_over} handed over to transformers' own code; *own code* has no
experts interface and stays as it is.

"""


def page(findings: list[Finding]) -> str:
    """``docs/families.md``."""
    introduction = _INTRODUCTION.format(
        version=metadata.version("transformers"),
        exact=sum(f.decoding == EXACT for f in findings),
        refused=sum(f.decoding == REFUSED for f in findings),
        fused=sum(f.experts == FUSED for f in findings),
        handed_over=sum(f.experts.startswith("handed over") for f in findings),
    )
    table = [_HEADING, "| --- | --- | --- | --- | --- |", *(f.line() for f in findings)]
    left_out = [f"| {_family(n)} | {n} | {NOT_BUILT[n]} |" for n in CLASSES if n in NOT_BUILT]
    left_out = [
        "",
        "## Not tried",
        "",
        "| family | class | why |",
        "| --- | --- | --- |",
        *left_out,
    ]
    return introduction + "\n".join([*table, *left_out, ""])


def _family(name: str) -> str:
    return CLASSES[name].split(".")[-2]


def stated() -> dict[str, str]:
    """The page's line of each class."""
    table = PAGE.read_text().partition(_HEADING)[2].partition("## Not tried")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    return {row.split(" | ")[1]: row for row in rows}


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page([finding(name) for name in FAMILY_NAMES]))
