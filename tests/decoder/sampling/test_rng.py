"""The counter RNG: open interval, uniformity, independence of everything that is hashed, purity."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chi2, kstest

from decoder.sampling import rng
from decoder.sampling.coupled import race
from decoder.sampling.rng import Stream

N = 200_000
SEEDS = torch.arange(N)
ZEROS = torch.zeros(N, dtype=torch.int64)


def axis(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(seeds, positions) that differ along one axis in consecutive small steps."""
    return (SEEDS, ZEROS + 7) if name == "seed" else (ZEROS + 3, SEEDS)


@pytest.mark.parametrize("name", ["seed", "position"])
@pytest.mark.parametrize("stream", list(Stream))
def test_uniforms_of_consecutive_counters_are_uniform(name, stream):
    u = rng.uniform(*axis(name), stream)
    assert u.dtype == torch.float64
    assert float(u.min()) > 0 and float(u.max()) < 1
    assert kstest(u.numpy(), "uniform").pvalue > 1e-6
    assert pair_p_value(u[:-1], u[1:]) > 1e-6


def pair_p_value(a: torch.Tensor, b: torch.Tensor) -> float:
    """χ² of (a, b) on a 16 × 16 grid."""
    counts = torch.bincount((a * 16).long() * 16 + (b * 16).long(), minlength=256).double()
    expected = len(a) / 256
    return float(chi2.sf(float(((counts - expected) ** 2 / expected).sum()), 255))


def test_streams_are_independent_of_each_other():
    draws = {stream: rng.uniform(ZEROS + 3, SEEDS, stream) for stream in Stream}
    for a in Stream:
        for b in Stream:
            if a < b:
                assert pair_p_value(draws[a], draws[b]) > 1e-6, (a, b)
                assert not torch.isin(draws[a], draws[b]).any()


def test_extreme_keys_stay_inside_the_open_interval():
    # The smallest and largest 51-bit integers the conversion can see.
    bits = torch.tensor([0, 2**51 - 1], dtype=torch.int64)
    u = (bits.double() + 0.5) * 2.0**-51
    assert u[0] > 0 and u[1] < 1
    assert (rng._shift_right(torch.tensor([-1]), 13, 64)).item() == 2**51 - 1
    words = torch.tensor([0, 2**31 - 1], dtype=torch.int32)
    for high in words:
        for low in (torch.tensor(1), torch.tensor(2**31 - 1)):
            x = (high.float() + low.float() * 2.0**-31) * 2.0**-31
            e = -torch.log1p(-x.clamp(max=rng._LARGEST_BELOW_ONE))
            assert 0 < e < 20


def test_noise_is_exponential_along_every_axis():
    by_id = rng.exponential(torch.tensor([5]), torch.tensor([9]), N, Stream.TARGET)[0]
    by_position = rng.exponential(ZEROS + 5, SEEDS, 3, Stream.TARGET)
    by_seed = rng.exponential(SEEDS, ZEROS + 9, 3, Stream.TARGET)
    for sample in (by_id, by_position[:, 2], by_seed[:, 0]):
        assert sample.dtype == torch.float32 and float(sample.min()) > 0
        assert kstest(sample.double().numpy(), "expon").pvalue > 1e-6
    uniforms = -torch.expm1(-by_position.double())
    assert pair_p_value(uniforms[:, 0], uniforms[:, 1]) > 1e-6
    assert pair_p_value(uniforms[:-1, 0], uniforms[1:, 0]) > 1e-6
    assert pair_p_value(uniforms[:-1, 1], uniforms[1:, 0]) > 1e-6
    along = -torch.expm1(-by_id.double())
    assert pair_p_value(along[:-1], along[1:]) > 1e-6


def test_one_changed_bit_changes_half_of_the_bits():
    keys = rng.key(ZEROS[:2000] + 3, SEEDS[:2000], Stream.DRAFT)
    base, _ = rng._vocab_words(keys, 1)
    for bit in range(64):
        flip = 1 << bit if bit < 63 else -(1 << 63)
        other, _ = rng._vocab_words(keys ^ flip, 1)
        changed = base ^ other
        rates = torch.tensor([(changed >> i).bitwise_and(1).double().mean() for i in range(31)])
        assert float((rates - 0.5).abs().max()) < 0.06, bit


def test_small_probabilities_are_drawn_at_their_rate():
    # 2**-20 needs noise with more than the 24 bits of a naive fp32 uniform near 1.
    probs = torch.tensor([1 - 2.0**-16, 2.0**-16])
    hits = 0
    for start in range(0, 20):
        keys = rng.key(ZEROS + start, SEEDS, Stream.TARGET)
        hits += int(race(probs.expand(N, 2), keys).sum())
    expected = 20 * N * 2.0**-16
    assert abs(hits - expected) < 5 * math.sqrt(expected)


def test_draws_follow_the_probabilities():
    probs = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    drawn = race(probs.expand(N, 5), rng.key(SEEDS, ZEROS, Stream.DRAFT))
    counts = torch.bincount(drawn, minlength=5).double()
    assert counts[1] == 0
    kept = probs > 0
    statistic = ((counts - N * probs) ** 2 / (N * probs))[kept].sum()
    assert chi2.sf(float(statistic), 3) > 1e-6
    unnormalised = race(7.0 * probs.expand(N, 5), rng.key(SEEDS, ZEROS, Stream.DRAFT))
    assert torch.equal(unnormalised, drawn)


def test_pure_function_of_what_is_hashed():
    seeds, positions = torch.tensor([11, 12, 13]), torch.tensor([[4, 5], [9, 10], [4, 5]])
    whole = rng.exponential(seeds, positions, 70, Stream.TARGET)
    assert whole.shape == (3, 2, 70)
    alone = rng.exponential(seeds[1:2], positions[1:2, 1], 70, Stream.TARGET)
    assert torch.equal(alone[0], whole[1, 1])
    # A larger vocabulary (a padded embedding) leaves the noise of the ids before it unchanged.
    longer = rng.exponential(seeds, positions, 75, Stream.TARGET)
    assert torch.equal(longer[..., :70], whole)
    assert torch.equal(
        rng.uniform(seeds[2:], positions[2:], Stream.ACCEPT),
        rng.uniform(seeds, positions, Stream.ACCEPT)[2:],
    )
    assert torch.equal(rng.gumbel(seeds, positions, 70, Stream.TARGET).argmax(-1), whole.argmin(-1))


def test_known_values_do_not_change():
    """Outputs for a seed are a promise to users: these bits may not change between versions."""
    seeds, positions = torch.tensor([0, 2**63 - 1]), torch.tensor([0, 2**31])
    keys = rng.key(seeds, positions, Stream.TARGET)
    high, _ = rng._vocab_words(keys, 2)
    assert (keys.tolist(), high.tolist()) == KNOWN


def test_folded_seeds_differ_and_are_independent():
    rounds = torch.arange(N)
    folded = rng.fold(ZEROS + 3, rounds)
    assert len(folded.unique()) == N
    a = rng.uniform(folded[:-1], ZEROS[1:], Stream.ACCEPT)
    b = rng.uniform(folded[1:], ZEROS[1:], Stream.ACCEPT)
    assert pair_p_value(a, b) > 1e-6


KNOWN = (
    [-862214114920475705, 8327809512276551718],
    [[404175685, 1723872707], [1317644006, 126880320]],
)
