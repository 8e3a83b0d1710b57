"""The race op draws what the sampler's own noise in PyTorch draws."""

from __future__ import annotations

import pytest
import torch

from decoder.sampling import rng
from moesd_kernels.dense import ops

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))
# Of a winner's score, which logarithms in other orders may give to a neighbour.
CLOSE = 1 - 2.0**-20


def keys_of(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)


def scores_of(probs: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return probs / rng.exponential_of(keys, probs.shape[-1])


@pytest.mark.parametrize("spread", [0.0, 2.0, 20.0], ids=["flat", "trained", "peaked"])
@pytest.mark.parametrize("V", [1, 2, 7, 63, 64, 127, 128, 129, 1000, 49152])
def test_the_largest_score_wins(V: int, spread: float) -> None:
    keys = keys_of(5, 3)
    generator = torch.Generator().manual_seed(V)
    probs = torch.randn(5, 3, V, generator=generator).mul(spread).softmax(-1)
    tokens, scores = ops.race(probs, keys), scores_of(probs, keys)
    won = scores.gather(-1, tokens[..., None])[..., 0]
    assert (won >= scores.amax(-1) * CLOSE).all()
    assert (tokens == scores.argmax(-1)).float().mean() > 0.9
    for i in range(5):  # a row alone, in another layout
        alone = probs[i, :, None].expand(3, 2, V)[:, 0]
        assert torch.equal(ops.race(alone, keys[i]), tokens[i])


def test_a_probability_of_zero_never_wins() -> None:
    keys, probs = keys_of(4000), torch.zeros(4000, 300)
    probs[:, 200:] = 1e-38  # a denormal's neighbour
    probs[:, 260] = 0
    tokens = ops.race(probs, keys)
    assert (tokens >= 200).all() and not (tokens == 260).any()
    probs[:, 17] = 1.0
    assert (ops.race(probs, keys) == 17).all()


def test_frequencies_are_the_probabilities() -> None:
    N = 40_000
    law = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = ops.race(law.expand(N, 4), keys_of(N)).bincount(minlength=4)
    deviation = (N * law * (1 - law)).sqrt()
    assert ((counts - N * law).abs() < 5 * deviation).all()


def test_what_is_undefined_stays_inside_the_vocabulary() -> None:
    probs = torch.full((3, 200), float("nan"))
    probs[1, 5] = 1.0
    tokens = ops.race(probs, keys_of(3))
    assert ((tokens >= 0) & (tokens < 200)).all()


def test_empty_and_errors() -> None:
    assert ops.race(torch.ones(0, 5), keys_of(0)).shape == (0,)
    with pytest.raises(ValueError, match=r"with V > 0, got \[2, 0\]"):
        ops.race(torch.ones(2, 0), keys_of(2))
    with pytest.raises(ValueError, match=r"keys must be \[2\] as probs are, got \[3\]"):
        ops.race(torch.ones(2, 5), keys_of(3))
    with pytest.raises(TypeError, match="probs must be Float, got BFloat16"):
        ops.race(torch.ones(2, 5, dtype=torch.bfloat16), keys_of(2))
    with pytest.raises(TypeError, match="keys must be int64, got Int"):
        ops.race(torch.ones(2, 5), keys_of(2).int())
