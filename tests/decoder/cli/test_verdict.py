"""The sentence at the end of a comparison has the numbers of the two runs."""

from decoder.cli.verdict import verdict
from decoder.engine.metrics import DecoderStats


def stats(rounds, gamma, accepted, **ms):
    out = DecoderStats()
    times = {**dict.fromkeys(("draft", "verify", "sample", "host"), 0.0), **ms}
    for _ in range(rounds):
        out.observe(gamma, [gamma] * 2, [accepted] * 2, {k: v / 1e3 for k, v in times.items()})
    return out


PLAIN = stats(12, 0, 0, verify=10.0)


def test_costs_tokens_ratio_and_what_was_predicted():
    said = verdict(PLAIN, stats(4, 4, 2, verify=13.0, draft=5.0), 1.667, 1.7)
    assert said == (
        "Verifying 5.0 tokens of every sequence took as long as 1.30 steps of one token, drafting "
        "them as long as 0.50, and a round brought 3.00 tokens: 1.67 times the speed of plain "
        "decoding, where 1.70 was predicted."
    )
    assert "predicted" not in verdict(PLAIN, stats(4, 4, 2, verify=13.0), 1.667)


def test_without_drafts():
    assert verdict(PLAIN, PLAIN, 1.0) == (
        "Hardly anything was drafted: 1.00 times the speed of plain decoding."
    )
