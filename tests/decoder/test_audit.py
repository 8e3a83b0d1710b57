"""The audit behind ``python -m decoder verify``: what it passes and, above all, what it fails."""

from __future__ import annotations

import copy
import json
import math
import shutil

import pytest
import torch
from support.tiny import VOCAB, perturbed, random_prompts, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from decoder import SamplingParams, SpeculativeDecoder
from decoder import audit as verification
from decoder.__main__ import main
from decoder.audit import Audit, Divergence, LawCheck, audit, logit_jitter
from decoder.drafters.independent import IndependentDrafter
from decoder.errors import UserError
from decoder.requests.outputs import Output, SequenceStats
from decoder.requests.reader import Request
from decoder.sampling import Sampler
from decoder.sampling import sampler as sampler_module
from moesd_kernels import quantize


@pytest.fixture(scope="module")
def pair():
    target = tiny_model("llama")
    return target, perturbed(target, 3, 0.2)


def decoders(pair, verifier="standard"):
    options = {"max_batch_size": 4, "max_length": 64, "kernels": False}
    plain = SpeculativeDecoder(pair[0], None, 0, verifier, **options)
    return plain, SpeculativeDecoder(pair[0], IndependentDrafter(pair[1]), 3, verifier, **options)


PROMPTS = random_prompts(6, seed=4, low=3)


@pytest.mark.parametrize(
    ("verifier", "params"),
    [
        ("standard", SamplingParams(max_new_tokens=20)),
        ("block", SamplingParams(repetition_penalty=1.2, max_new_tokens=20)),
        ("coupled", SamplingParams(temperature=0.9, top_p=0.9, seed=3, max_new_tokens=20)),
    ],
)
def test_a_right_decoder_passes(pair, verifier, params):
    result = audit(*decoders(pair, verifier), PROMPTS, params, lambda: pair[0])
    assert result.passed and result.identical == result.exact == 6
    assert result.tokens == 120 and result.law is None
    assert 0 <= result.jitter < 1e-4


@pytest.mark.parametrize(
    ("verifier", "params"),
    [
        ("standard", SamplingParams(max_new_tokens=20)),
        ("coupled", SamplingParams(temperature=0.9, top_k=10, seed=3, max_new_tokens=20)),
    ],
)
def test_a_target_that_sees_a_shifted_position_is_unexplained(pair, verifier, params, monkeypatch):
    plain, speculative = decoders(pair, verifier)
    forward = speculative.runner.forward
    shift = True

    def shifted(ids, rows, positions, **options):
        return forward(ids, rows, positions + (1 if shift and ids.shape[1] > 1 else 0), **options)

    jitter = verification.logit_jitter

    def honest_jitter(*args):
        nonlocal shift
        shift = False
        return jitter(*args)

    monkeypatch.setattr(speculative.runner, "forward", shifted)
    monkeypatch.setattr(verification, "logit_jitter", honest_jitter)
    result = audit(plain, speculative, PROMPTS, params, lambda: pair[0])
    assert not result.passed and result.unexplained >= 1
    worst = result.divergences[0]
    assert worst.kind == "unexplained" and worst.margin > worst.tolerance


def test_a_difference_within_the_jitter_is_a_near_tie(pair, monkeypatch):
    """Noise as large as the margins, on the verify shape only: all explained, and counted."""
    plain, speculative = decoders(pair)
    forward = speculative.runner.forward
    generator = torch.Generator().manual_seed(0)

    def noisy(ids, rows, positions, **options):
        out = forward(ids, rows, positions, **options)
        if ids.shape[1] == 1:
            return out
        noise = torch.rand(out.logits.shape, generator=generator).sub(0.5).mul(2.0).round()
        return out._replace(logits=out.logits + noise)

    monkeypatch.setattr(speculative.runner, "forward", noisy)
    params = SamplingParams(max_new_tokens=20)
    result = audit(plain, speculative, PROMPTS, params, lambda: pair[0])
    assert result.jitter == pytest.approx(1.0, rel=1e-4)
    assert result.divergences and result.passed
    assert all(d.kind == "near-tie" for d in result.divergences)
    assert result.identical == 6 - len(result.divergences)


@pytest.mark.parametrize("verifier", ["standard", "block"])
def test_sampled_output_is_compared_in_law(pair, verifier):
    prompts = [{"token_ids": p, "seed": 10 * i} for i, p in enumerate(random_prompts(60, seed=5))]
    params = SamplingParams(temperature=1.0, max_new_tokens=12)
    result = audit(*decoders(pair, verifier), prompts, params, lambda: pair[0])
    assert result.exact == 0 and result.law.sequences == 60
    assert result.passed and abs(result.law.difference) < 3 * result.law.half_width


def test_the_law_is_that_of_the_output_where_a_model_keeps_all_logits(pair):
    """As Qwen3-Omni's thinker does, whatever it is asked for."""
    target = pair[0]

    class KeepsAll:
        device = target.device

        def __call__(self, input_ids, logits_to_keep):
            return target(input_ids=input_ids)

    arguments = PROMPTS, SamplingParams(temperature=1.0, seed=1, max_new_tokens=8)
    expected = audit(*decoders(pair), *arguments, lambda: target).law
    law = audit(*decoders(pair), *arguments, KeepsAll).law
    assert law.difference == pytest.approx(expected.difference, abs=1e-6)
    assert law.half_width == pytest.approx(expected.half_width, abs=1e-6)


def test_the_law_check_catches_a_sampler_that_keeps_every_draft(pair, monkeypatch):
    def lenient(target_probs, draft, uniforms):
        return draft.lengths.clone()

    monkeypatch.setattr(sampler_module, "accept_standard", lenient)
    prompts = [{"token_ids": p, "seed": 10 * i} for i, p in enumerate(random_prompts(60, seed=5))]
    params = SamplingParams(temperature=1.0, max_new_tokens=12)
    draft = tiny_model("llama", seed=9)  # nothing like the target
    result = audit(*decoders((pair[0], draft)), prompts, params, lambda: pair[0])
    assert result.law.p_value < 1e-6 and not result.passed


def test_greedy_and_sampled_requests_in_one_audit(pair):
    prompts = [{"token_ids": p, "temperature": 1.0 * (i % 2)} for i, p in enumerate(PROMPTS)]
    params = SamplingParams(max_new_tokens=8)
    result = audit(*decoders(pair), prompts, params, lambda: pair[0])
    assert (result.exact, result.identical, result.law.sequences) == (3, 3, 3)


@pytest.mark.parametrize("greedy", [0, 2])
def test_one_sampled_request_is_not_passed_for_compared(pair, greedy):
    prompts = [{"token_ids": p, "temperature": 0.0} for p in PROMPTS[:greedy]]
    prompts.append({"token_ids": PROMPTS[-1], "temperature": 1.0, "id": "lonely"})
    with pytest.raises(UserError, match=r"two sampled sequences or more.*'lonely' alone"):
        audit(*decoders(pair), prompts, SamplingParams(max_new_tokens=4), lambda: pair[0])


def _output(tokens: list[int]) -> Output:
    return Output(0, None, None, tokens, "", "length", SequenceStats(2))


def test_an_output_that_ends_early_is_never_a_near_tie(pair):
    request = Request(0, None, None, [1, 2], SamplingParams(), frozenset(), 4)
    found = verification._explain(pair[0], request, _output([3, 4]), _output([3]), 99.0)
    assert (found.offset, found.autoregressive, found.speculative) == (1, 4, None)
    assert found.margin == math.inf and found.kind == "unexplained"


def test_margin_is_measured_on_what_decides_the_token():
    logits = torch.zeros(1, 1, 8)
    logits[0, 0, :3] = torch.tensor([2.0, 1.5, 1.0])
    greedy = Request(0, None, None, [1], SamplingParams(), frozenset(), 4)
    assert verification._margin(logits, greedy, [], 0, 1) == pytest.approx(0.5)
    biased = Request(0, None, None, [1], SamplingParams(logit_bias={1: 0.4}), frozenset(), 4)
    assert verification._margin(logits, biased, [], 0, 1) == pytest.approx(0.1)
    penal = Request(0, None, None, [5], SamplingParams(presence_penalty=0.5), frozenset(), 4)
    assert verification._margin(logits, penal, [0], 0, 1) == pytest.approx(0.0)
    cut = SamplingParams(temperature=1.0, top_k=2, seed=1)
    distance = verification._margin(
        logits, Request(0, None, None, [1], cut, frozenset(), 4), [], 0, 2
    )
    assert distance == pytest.approx(0.5)  # token 2 lies 0.5 below the last one kept


def test_scores_are_what_a_sampled_token_is_the_argmax_of():
    sampler = Sampler(3, 20, "cpu", "coupled")
    for row in range(3):
        temperature = (0.0, 0.7, 1.3)[row]
        sampler.admit(row, SamplingParams(temperature=temperature, top_p=0.9, seed=row), [0], ())
    logits = torch.randn(3, 1, 20, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(3)
    for position in range(1, 30):
        at = torch.full((3, 1), position)
        drawn = sampler.draw(sampler.distribution(logits, rows, at), rows, at[:, 0])
        assert torch.equal(sampler.scores(logits, rows, at).argmax(-1), drawn)


def test_jitter_sees_a_difference_between_batch_shapes(pair, monkeypatch):
    decoder = decoders(pair)[1]
    texts, starts = [list(range(10)), list(range(5, 18))], [4, 7]
    assert logit_jitter(decoder.runner, texts, starts, 4) < 1e-4
    forward = decoder.runner.forward

    def shaped(ids, rows, positions, **options):
        out = forward(ids, rows, positions, **options)
        return out._replace(logits=out.logits + 0.25 * (ids.shape[1] > 1))

    monkeypatch.setattr(decoder.runner, "forward", shaped)
    assert logit_jitter(decoder.runner, texts, starts, 4) == pytest.approx(0.25, abs=1e-3)


def test_a_failed_law_fails_the_audit():
    assert Audit(law=LawCheck(10, 0.0, 0.1, 1.0)).passed
    assert not Audit(law=LawCheck(10, 1.0, 0.1, 1e-9)).passed
    assert Audit(divergences=[Divergence(0, 1, 2, 3, 0.1, 0.1)]).passed
    assert not Audit(divergences=[Divergence(0, 1, 2, 3, 0.2, 0.1)]).passed


@pytest.fixture(scope="module")
def folders(pair, tmp_path_factory):
    words = WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
    root = tmp_path_factory.mktemp("verify")
    for name, model in zip(("target", "draft"), pair, strict=True):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    lines = [json.dumps({"token_ids": p}) for p in PROMPTS]
    (root / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return root


def arguments(folders, *more: str) -> list[str]:
    return [
        "verify", "--target", str(folders / "target"), "--draft", str(folders / "draft"),
        "--prompts", str(folders / "prompts.jsonl"), "--gamma", "3", "--max-new-tokens", "12",
        "--batch-size", "4", "--experts-implementation", "eager", *more,
    ]  # fmt: skip


def test_command_prints_a_table_and_succeeds(folders, capsys):
    assert main(arguments(folders)) == 0
    printed = capsys.readouterr().out
    assert "6 of 6" in printed and "unexplained" in printed and "passed" in printed


def test_command_prints_json_and_repeats_prompts(folders, capsys):
    assert main(arguments(folders, "--json", "--temperature", "1", "--samples", "3")) == 0
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert record["passed"] and record["law"]["sequences"] == 18 and record["exact"] == 0


def test_command_has_a_reference_of_quantised_weights(folders, pair, capsys):
    quantize(copy.deepcopy(pair[0]), "int8").save_pretrained(folders / "own")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders / "target" / name, folders / "own")
    more = ("--target", str(folders / "own"), "--temperature", "1", "--samples", "2")
    assert main(arguments(folders, *more)) == 0
    assert "passed" in capsys.readouterr().out


def test_command_fails_on_something_unexplained(folders, capsys, monkeypatch):
    from decoder.round import Verdict

    verify = sampler_module.verify_greedy

    def careless(target_argmax, draft):
        verdict = verify(target_argmax, draft)
        if draft.gamma == 0:
            return verdict
        tokens = torch.cat([draft.tokens, target_argmax[:, -1:]], dim=1)
        index = torch.arange(tokens.shape[1])
        keep = index <= draft.lengths[:, None]
        return Verdict(draft.lengths, torch.where(keep, tokens, -1))

    monkeypatch.setattr(sampler_module, "verify_greedy", careless)
    assert main(arguments(folders)) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed and "unexplained" in printed
