"""The decode loop: greedy output is the target's own whatever the drafts, batches and ends."""

import itertools

import pytest
import torch
from support.decoding import decoder
from support.scripted import NoisyOracle
from support.tiny import EOS, LetterTokenizer, greedy_reference, ragged_prompts, tiny_moe

from decoder import SamplingParams

torch.set_num_threads(1)
NEW = 14


@pytest.fixture(scope="module")
def target():
    return tiny_moe()


@pytest.fixture(scope="module")
def prompts():
    return ragged_prompts(9)


@pytest.fixture(scope="module")
def expected(target, prompts):
    return [greedy_reference(target, prompt, NEW) for prompt in prompts]


@pytest.fixture(scope="module")
def oracle(target, prompts):
    texts = [greedy_reference(target, prompt, NEW + 10, eos=False) for prompt in prompts]
    table = {tuple(p): text for p, text in zip(prompts, texts, strict=True)}
    return lambda period: NoisyOracle(table, period)


def tokens(outputs):
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("gamma", [0, 1, 3, 6, "auto"])
@pytest.mark.parametrize("period", [2, 3, 10**9])
def test_greedy_is_the_targets_own(target, prompts, expected, oracle, gamma, period):
    outputs = decoder(target, oracle(period), gamma).generate(
        prompts, SamplingParams(max_new_tokens=NEW)
    )
    assert tokens(outputs) == expected
    assert [output.index for output in outputs] == list(range(len(prompts)))


@pytest.mark.parametrize("verifier", ["standard", "block", "coupled"])
@pytest.mark.parametrize("drafter", [None, "ngram", "self"])
def test_greedy_under_every_verifier_and_built_in_drafter(
    target, prompts, expected, drafter, verifier
):
    outputs = decoder(target, drafter, 2, verifier=verifier).generate(
        prompts, SamplingParams(max_new_tokens=NEW)
    )
    assert tokens(outputs) == expected


def test_independent_draft_model(target, prompts, expected):
    outputs = decoder(target, tiny_moe(seed=1, layers=1), 4).generate(
        prompts, SamplingParams(max_new_tokens=NEW)
    )
    assert tokens(outputs) == expected


def test_order_and_batch_size_do_not_matter(target, prompts, expected, oracle):
    for size, order in itertools.product((1, 9), (1, -1)):
        outputs = decoder(target, oracle(3), 3, max_batch_size=size).generate(
            prompts[::order], SamplingParams(max_new_tokens=NEW)
        )
        assert tokens(outputs)[::order] == expected


class Script:
    """A controller that plays a list of draft lengths, again and again."""

    max_gamma = 6

    def __init__(self, gammas):
        self.gammas = itertools.cycle(gammas)

    def choose(self, live_batch, context):
        return next(self.gammas)

    def observe(self, gamma, batch, drafted, accepted, times):
        assert len(drafted) == len(accepted) == batch
        assert all(k <= n <= gamma for k, n in zip(accepted, drafted, strict=True))
        assert set(times) >= {"draft", "verify", "sample", "host"}

    def admitted(self, tokens, seconds, prompt_tokens):
        assert tokens > 0
        assert seconds >= 0
        assert prompt_tokens > 0

    def explain(self):
        return "scripted"


def test_gamma_changing_mid_run_changes_nothing(target, prompts, expected, oracle):
    draft = tiny_moe(seed=0, layers=1)
    for drafter in (oracle(2), draft, "self"):
        outputs = decoder(target, drafter, Script([3, 0, 1, 6, 0, 0, 2])).generate(
            prompts, SamplingParams(max_new_tokens=NEW)
        )
        assert tokens(outputs) == expected


def test_ends_at_every_accept_position(target, prompts, oracle):
    """Whatever token ends the sequence and wherever in a round it falls, nothing follows it."""
    prompt = prompts[3]
    text = greedy_reference(target, prompt, NEW, eos=False)
    for end in range(NEW):
        stop = text[end]
        if stop in text[:end]:
            continue
        for gamma in (0, 1, 4, 6):
            params = SamplingParams(max_new_tokens=NEW, stop_token_ids=(stop,), ignore_eos=True)
            (output,) = decoder(target, oracle(10**9), gamma).generate([prompt], params)
            assert output.token_ids == text[: end + 1]
            assert output.finish_reason == "stop"
            assert len(output.drafted) == end + 1


def test_length_limit_is_exact_and_eos_beats_it(target, prompts, oracle):
    prompt = prompts[2]
    text = greedy_reference(target, prompt, NEW, eos=False)
    for limit in range(1, NEW):
        params = SamplingParams(max_new_tokens=limit, ignore_eos=True)
        (output,) = decoder(target, oracle(10**9), 6).generate([prompt], params)
        assert output.token_ids == text[:limit]
        assert output.finish_reason == "length"
    last = text[NEW - 1]
    if last not in text[: NEW - 1]:
        params = SamplingParams(max_new_tokens=NEW, stop_token_ids=(last,), ignore_eos=True)
        (output,) = decoder(target, oracle(10**9), 6).generate([prompt], params)
        assert output.finish_reason == "stop"


def test_stop_strings_cut_text_and_tokens(target, prompts, oracle):
    tokenizer = LetterTokenizer()
    prompt = prompts[4]
    text = greedy_reference(target, prompt, NEW, eos=False)
    letters = tokenizer.decode(text, skip_special_tokens=True)
    stop = letters[5:7]
    at = letters.find(stop)
    for gamma in (0, 3, 6):
        (output,) = decoder(target, oracle(10**9), gamma, tokenizer=tokenizer).generate(
            [prompt], SamplingParams(max_new_tokens=NEW, stop=stop, ignore_eos=True)
        )
        assert output.text == letters[:at]
        assert tokenizer.decode(output.token_ids).endswith(stop)
        assert output.finish_reason == "stop"
        assert len(output.drafted) == len(output.token_ids)


def test_eos_is_the_models_and_can_be_ignored(target, prompts):
    reason = set()
    for prompt in ragged_prompts(40, seed=5):
        (output,) = decoder(target).generate([prompt], SamplingParams(max_new_tokens=30))
        reason.add(output.finish_reason)
        assert EOS not in output.token_ids[:-1]
        if output.finish_reason == "eos":
            assert output.token_ids[-1] == EOS
            (longer,) = decoder(target).generate(
                [prompt], SamplingParams(max_new_tokens=30, ignore_eos=True)
            )
            assert len(longer.token_ids) == 30
            break


def test_streams_from_an_endless_iterator_with_bounded_look_ahead(target, oracle, prompts):
    read = 0

    def endless():
        nonlocal read
        for prompt in itertools.cycle(prompts):
            read += 1
            yield prompt

    engine = decoder(target, oracle(3), 3)
    stream = engine.stream(endless(), SamplingParams(max_new_tokens=5))
    finished = [next(stream) for _ in range(20)]
    assert read <= 20 + engine.max_batch_size
    stream.close()
    assert len({output.index for output in finished}) == 20
    # Closing abandons what was running; the decoder can be used again.
    again = engine.generate(prompts[:2], SamplingParams(max_new_tokens=5))
    assert len(again) == 2


def test_interruption_leaves_the_decoder_usable(target, prompts, expected):
    engine = decoder(target, "ngram", 2)

    def stop(output):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, SamplingParams(max_new_tokens=NEW), on_output=stop)
    assert tokens(engine.generate(prompts, SamplingParams(max_new_tokens=NEW))) == expected


def test_a_full_context_is_used_to_the_last_token(target, oracle):
    prompt = [7] * 20
    params = SamplingParams(max_new_tokens=100, ignore_eos=True)
    (plain,) = decoder(target, max_length=32).generate([prompt], params)
    assert len(plain.token_ids) == 12
    for drafter in ("ngram", "self", tiny_moe(seed=0, layers=1)):
        (output,) = decoder(target, drafter, 5, max_length=32).generate([prompt], params)
        assert output.token_ids == plain.token_ids


def test_statistics_add_up(target, prompts, oracle):
    engine = decoder(target, oracle(10**9), 3)
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    stats = engine.stats
    assert stats.sequences == len(prompts)
    assert stats.tokens == sum(len(o.token_ids) for o in outputs) == NEW * len(prompts)
    assert stats.alpha == 1.0
    assert stats.drafted == sum(o.stats.drafted for o in outputs)
    assert stats.row_rounds == sum(o.stats.rounds for o in outputs)
    assert stats.acceptance_length > 3
    # The first token of every sequence comes from prefill, the rest from rounds.
    assert stats.accepted + stats.row_rounds == stats.tokens - len(prompts)
    rounds = sum(stats.ms_per_round().values()) * stats.rounds / 1e3
    assert stats.decode_tokens_per_second * rounds == pytest.approx(stats.tokens - len(prompts))
    assert engine.stats.as_dict()["alpha_by_position"] == [1.0, 1.0, 1.0]


def test_target_efficiency_needs_both_kinds_of_rounds(target, prompts, oracle):
    engine = decoder(target, oracle(2), 2)
    params = SamplingParams(max_new_tokens=NEW)
    engine.generate(prompts[:4], params)
    speculative = engine.stats
    assert speculative.target_efficiency() is None
    plain = decoder(target)
    plain.generate(prompts[:4], params)
    assert speculative.target_efficiency(plain.stats) > 0


def test_logprobs_are_the_targets(target, prompts, oracle):
    params = SamplingParams(max_new_tokens=6, logprobs=2, ignore_eos=True)
    for gamma in (0, 4):
        first, second = decoder(target, oracle(3), gamma).generate(
            prompts[:2], [params, SamplingParams(max_new_tokens=6)]
        )
        assert second.logprobs is None
        ids = prompts[0] + first.token_ids
        with torch.no_grad():
            full = target(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
        for i, entry in enumerate(first.logprobs):
            row = full[len(prompts[0]) + i - 1]
            assert entry.token_id == first.token_ids[i]
            assert entry.raw == pytest.approx(row[entry.token_id].item(), abs=1e-5)
            assert [t for t, _ in entry.top] == row.topk(2).indices.tolist()


def test_rows_used_again_hold_nothing_of_their_predecessor(target, oracle, prompts, expected):
    engine = decoder(target, oracle(2), 3, max_batch_size=2)
    for _ in range(2):
        outputs = engine.generate(prompts, SamplingParams(max_new_tokens=NEW))
        assert tokens(outputs) == expected
