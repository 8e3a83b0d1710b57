"""Noise and draws: the hash of ``decoder.sampling.rng`` to the bit, its law, its winners."""

import pytest
import torch
import triton
import triton.language as tl
from scipy.stats import chi2, kstest

from decoder.sampling import rng
from decoder.sampling.coupled import race as reference
from decoder.sampling.rng import Stream
from moesd_kernels.dense.triton.sampling import noise, race_kernel
from moesd_kernels.dense.triton.sampling.race_kernel import race

SEEDS = torch.tensor([0, -1, 2**63 - 1, -(2**63), 1234567890123456789])
POSITIONS = torch.tensor([[0, 1, 2**31], [5, 2**40, 7], [1, 1, 1], [9, 8, 7], [0, 0, 131071]])
ROUNDS = torch.tensor([0, 3, 2**33, 1, 7])


@triton.jit
def _noise_kernel(
    seeds_ptr, rounds_ptr, positions_ptr, keys_ptr, uniforms_ptr, noise_ptr, V: tl.constexpr
):
    at = tl.program_id(0)
    seed = noise.fold(tl.load(seeds_ptr + at // 3), tl.load(rounds_ptr + at // 3))
    key = noise.key_of(seed, tl.load(positions_ptr + at), noise.RESIDUAL)
    tl.store(keys_ptr + at, key.to(tl.int64))
    tl.store(uniforms_ptr + at, noise.uniform(key))
    tl.store(noise_ptr + at * V + tl.arange(0, V), noise.exponential(key, tl.arange(0, V)))


@triton.jit
def _log_kernel(u_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, noise._minus_log1m(tl.load(u_ptr + at)))


def test_noise_is_the_reference_s():
    V = 4096
    keys = torch.empty(5, 3, dtype=torch.int64)
    uniforms = torch.empty(5, 3, dtype=torch.float64)
    clocks = torch.empty(5, 3, V)
    _noise_kernel[(15,)](SEEDS, ROUNDS, POSITIONS, keys, uniforms, clocks, V)
    seeds = rng.fold(SEEDS, ROUNDS)
    assert torch.equal(keys, rng.key(seeds, POSITIONS, Stream.RESIDUAL))
    assert torch.equal(uniforms, rng.uniform(seeds, POSITIONS, Stream.RESIDUAL))
    torch.testing.assert_close(clocks, rng.exponential_of(keys, V), rtol=2.0**-21, atol=0)
    assert kstest(clocks.flatten().numpy(), "expon").pvalue > 1e-6


def test_streams_have_the_decoder_s_numbers():
    for stream in Stream:
        assert getattr(noise, stream.name).value == stream


def test_small_clocks_keep_their_precision():
    u = torch.tensor([2.0**-62, 2.0**-25, 2.0**-24, 2.0**-23, 1e-3, 0.3, 0.5, 1 - 2.0**-24])
    actual = torch.empty(8)
    _log_kernel[(1,)](u, actual, 8)
    torch.testing.assert_close(actual.double(), -(-u.double()).log1p(), rtol=2.0**-21, atol=0)


@pytest.mark.parametrize("rounds", [None, ROUNDS], ids=["request", "round"])
def test_draws_are_the_reference_s(monkeypatch, rounds):
    monkeypatch.setattr(race_kernel, "BLOCK", 64)
    rows = torch.tensor([3, 0, 4, 1])
    probs = (2 * torch.randn(4, 3, 150)).softmax(-1)
    probs[0, 0, :149] = 0.0
    probs[1, 1] = float("nan")
    probs[2, 0] = 0.0
    probs[3] *= 1e-30
    seeds = SEEDS[rows] if rounds is None else rng.fold(SEEDS[rows], rounds[rows])
    keys = rng.key(seeds, POSITIONS[:4], Stream.DRAFT)
    actual = race(probs, rows, SEEDS, POSITIONS[:4], int(Stream.DRAFT), rounds)
    assert actual.dtype == torch.int64 and torch.equal(actual, reference(probs, keys))
    assert actual[0, 0] == 149
    monkeypatch.setattr(race_kernel, "BLOCK", 256)
    one = race(probs[3:, 2:], rows[3:], SEEDS, POSITIONS[3:4, 2:], int(Stream.DRAFT), rounds)
    assert torch.equal(one, actual[3:, 2:])


def test_draws_have_the_law():
    law = torch.tensor([0.5, 0.3, 0.2, 0.0])
    N = 150
    tokens = race(law.expand(1, N, 4), torch.tensor([0]), SEEDS, torch.arange(N)[None], 3)
    counts = torch.bincount(tokens[0], minlength=4)
    assert counts[3] == 0
    wanted = N * law[:3]
    assert chi2.sf(float(((counts[:3] - wanted) ** 2 / wanted).sum()), 2) > 1e-6


def test_nothing_and_errors():
    rows, positions = torch.tensor([0, 1]), POSITIONS[:2]
    empty = race(torch.ones(0, 3, 4), rows[:0], SEEDS, positions[:0], 0)
    assert empty.shape == (0, 3) and empty.dtype == torch.int64
    with pytest.raises(ValueError, match=r"with V > 0, got \[2, 3, 0\]"):
        race(torch.ones(2, 3, 0), rows, SEEDS, positions, 0)
    with pytest.raises(TypeError, match=r"probs must be torch\.float32"):
        race(torch.ones(2, 3, 4).double(), rows, SEEDS, positions, 0)
    with pytest.raises(ValueError, match=r"positions must be \[2, 3\]"):
        race(torch.ones(2, 3, 4), rows, SEEDS, positions[:, :1], 0)
