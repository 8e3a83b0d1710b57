"""A request's own logits processor: exact for any function of the prefix, and shown no others."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from support.decoding import decoder as new_decoder
from support.tiny import EOS, perturbed, ragged_prompts, tiny_moe
from torch import Tensor

from decoder import SamplingParams

torch.set_num_threads(1)
COUNT = 14
MODEL = tiny_moe()
PROMPTS = ragged_prompts(4, seed=4)


class Shifted:
    """Moves logits by an amount that depends on the whole prefix, and bans what has been said."""

    def __init__(self) -> None:
        self.prefixes: list[list[int]] = []

    def __call__(self, output_ids: Sequence[int], logits: Tensor) -> Tensor:
        self.prefixes.append(list(output_ids))
        logits = logits.roll(sum(output_ids) % 3)
        logits[list(output_ids)] = float("-inf")
        return logits


def plainly(prompt: list[int], process: Shifted) -> list[int]:
    """Greedy decoding of one row by transformers' forward."""
    output: list[int] = []
    while len(output) < COUNT and EOS not in output:
        with torch.no_grad():
            logits = MODEL(torch.tensor([prompt + output])).logits[0, -1]
        output.append(int(process(output, logits).argmax()))
    return output


def decode(
    drafter: str,
    gamma: int,
    params: SamplingParams,
    processed: set[int],
    verifier: str = "standard",
) -> tuple[list[list[int]], dict[int, Shifted]]:
    """Outputs of all prompts; the rows of ``processed`` have a processor."""
    made = perturbed(MODEL) if drafter == "draft model" else drafter
    decoder = new_decoder(MODEL, made, gamma, max_batch_size=3, verifier=verifier)
    processes = {row: Shifted() for row in processed}
    for row, prompt in enumerate(PROMPTS):
        request = decoder.reader.read(row, prompt, params.updated({"seed": row}))
        request.process = processes.get(row)
        decoder.add(request)
    outputs: list[list[int]] = [[] for _ in PROMPTS]
    while not decoder.is_idle():
        for progress in decoder.step():
            outputs[progress.request.index] += progress.token_ids
    return outputs, processes


@pytest.mark.parametrize("drafter", ["ngram", "self", "draft model"])
def test_greedy_output_is_that_of_processing_every_step(drafter: str) -> None:
    params = SamplingParams(max_new_tokens=COUNT)
    expected = [plainly(prompt, Shifted()) for prompt in PROMPTS]
    plain, _ = decode("none", 0, params, set())
    outputs, _ = decode(drafter, 3, params, {0, 2, 3})
    assert outputs == [expected[0], plain[1], *expected[2:]]
    assert plain[0] != expected[0]


@pytest.mark.parametrize("verifier", ["standard", "block", "coupled"])
def test_only_prefixes_that_the_target_can_emit_are_shown(verifier: str) -> None:
    params = SamplingParams(max_new_tokens=COUNT, temperature=1.0)
    outputs, processes = decode("draft model", 3, params, {0, 1, 2, 3}, verifier)
    for row, process in processes.items():
        for prefix in process.prefixes:
            assert len(set(prefix)) == len(prefix), "a token that the processor had banned"
            assert EOS not in prefix, "tokens after the end"
        met = [prefix for prefix in process.prefixes if prefix == outputs[row][: len(prefix)]]
        assert {len(prefix) for prefix in met} >= set(range(len(outputs[row])))


def test_the_coupled_output_is_the_targets_own() -> None:
    params = SamplingParams(max_new_tokens=COUNT, temperature=1.5)
    alone, _ = decode("none", 0, params, {0, 1, 2}, "coupled")
    assert decode("draft model", 4, params, {0, 1, 2}, "coupled")[0] == alone


def test_a_row_given_up_leaves_its_processor_to_nobody() -> None:
    params = SamplingParams(max_new_tokens=6)
    decoder = new_decoder(MODEL, None, 0, max_batch_size=1)
    expected = decoder.generate([PROMPTS[0]], params)[0].token_ids
    request = decoder.reader.read(0, PROMPTS[0], params)
    request.process = lambda output_ids, logits: logits.flip(0)
    decoder.add(request)
    decoder.step()
    decoder.cancel(request)
    assert decoder.generate([PROMPTS[0]], params)[0].token_ids == expected
