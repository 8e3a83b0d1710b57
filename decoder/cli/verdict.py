"""What a comparison comes to, in one sentence."""

from __future__ import annotations

from decoder.engine.metrics import DecoderStats


def verdict(
    plain: DecoderStats,
    speculative: DecoderStats,
    ratio: float,
    predicted: float | None = None,
) -> str:
    """What a round cost in steps of one token, how many tokens came of it, and the ratio.

    Args:
        plain, speculative: of runs over the same prompts.
        ratio: of their tokens per second, as measured.
        predicted: the same before the run.
    """
    outcome = f"{ratio:.2f} times the speed of plain decoding"
    if predicted is not None:
        outcome += f", where {predicted:.2f} was predicted"
    efficiency, tokens = speculative.target_efficiency(plain), speculative.acceptance_length
    if not speculative.drafted or efficiency is None or tokens is None:
        return f"Hardly anything was drafted: {outcome}."
    verified = 1 + speculative.drafted / speculative.row_rounds
    draft = speculative.ms_per_round()["draft"] / sum(plain.ms_per_round().values())
    return (
        f"Verifying {verified:.1f} tokens of every sequence took as long as {1 / efficiency:.2f} "
        f"steps of one token, drafting them as long as {draft:.2f}, and a round brought "
        f"{tokens:.2f} tokens: {outcome}."
    )
