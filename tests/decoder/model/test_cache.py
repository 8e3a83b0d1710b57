"""The ragged cache: place = position, padding goes to the bin, growth keeps what was written."""

import pytest
import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from decoder.model.cache import RaggedCache, cache_argument


def states(B, Q, heads=2, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, heads, Q, width, generator=generator)


def test_writes_each_row_at_its_own_positions():
    cache = RaggedCache(4, 63)
    rows, positions = torch.tensor([2, 0]), torch.tensor([[5, 6, 7], [0, 1, 2]])
    cache.select(rows, positions)
    k, v = states(2, 3), states(2, 3, width=6, seed=1)
    keys, values = cache.update(k, v, 0)
    assert keys.shape == (4, 2, 64, 4)
    assert values.shape == (4, 2, 64, 6)
    assert torch.equal(keys[2, :, 5:8], k[0])
    assert torch.equal(values[0, :, 0:3], v[1])
    written = torch.zeros(4, 64, dtype=torch.bool)
    written[2, 5:8] = written[0, 0:3] = True
    assert not keys.transpose(1, 2)[~written].any(), "a position that nobody wrote changed"


def test_padding_is_written_to_the_last_position_only():
    cache = RaggedCache(2, 63)
    cache.select(torch.tensor([1]), torch.tensor([[3, -1, -1]]))
    keys, _ = cache.update(states(1, 3), states(1, 3), 0)
    assert set(keys[1].abs().sum((0, 2)).nonzero()[:, 0].tolist()) == {3, 63}
    assert not keys[0].any()


def test_growth_keeps_contents_and_bounds_length():
    cache = RaggedCache(2, 1000)
    cache.select(torch.tensor([0]), torch.tensor([[254]]))
    cache.reserve(255)
    before = cache.update(states(1, 1), states(1, 1), 0)[0].shape[2]
    cache.reserve(256)
    cache.select(torch.tensor([1]), torch.tensor([[255]]))
    keys, _ = cache.update(states(1, 1, seed=2), states(1, 1, seed=2), 0)
    assert keys.shape[2] > before
    assert torch.equal(keys[0, :, 254], states(1, 1)[0, :, 0])
    assert torch.equal(keys[1, :, 255], states(1, 1, seed=2)[0, :, 0])
    cache.reserve(1000)
    # The row's last block has room for more, which no one may use: its last position is the bin.
    with pytest.raises(ValueError, match="at most 1000 tokens, got 1001"):
        cache.reserve(1001)


@pytest.mark.parametrize("max_length", [1, 63, 64, 255, 256, 300, 1000])
@pytest.mark.parametrize("fixed", [False, True])
def test_rows_are_whole_blocks_with_the_bin_behind_every_token(max_length, fixed):
    cache = RaggedCache(1, max_length, max_length if fixed else None)
    for length in range(1, max_length + 1):
        cache.reserve(length)
        assert cache.row_length % 64 == 0
        assert length < cache.row_length <= max(256, max_length + 64)
    cache.select(torch.tensor([0]), torch.tensor([[max_length - 1, -1]]))
    assert cache.write_index.tolist() == [max_length - 1, cache.row_length - 1]


def test_slabs_start_as_zeros_and_count_their_bytes():
    cache = RaggedCache(2, 63)
    assert cache.nbytes() == 0
    cache.select(torch.tensor([0]), torch.tensor([[0]]))
    keys, _ = cache.update(states(1, 1), states(1, 1), 0)
    assert keys.isfinite().all()
    assert cache.nbytes() == 2 * 2 * 64 * 2 * 4 * 4


def test_overrides_nothing_of_transformers_by_accident():
    """Its classes have properties without setters, and which ones changes between versions."""
    cache = RaggedCache(2, 63)
    cache.select(torch.tensor([0]), torch.tensor([[0]]))
    cache.update(states(1, 1), states(1, 1), 0)
    interface = {"lazy_initialization", "update", "get_mask_sizes", "get_seq_length"}
    interface |= {"get_max_length", "is_compileable"}
    recurrent = {"get_conv_state", "get_recurrent_state", "has_previous_state"}
    recurrent |= {"update_conv_state", "update_recurrent_state"}
    for ours, base, meant in (
        (cache, Cache, recurrent & set(dir(Cache))),  # 5.17 has not yet all of them
        (cache.layers[0], CacheLayerMixin, interface),
    ):
        named = {name for name in vars(type(ours)) | vars(ours) if not name.startswith("__")}
        assert (named & set(dir(base))) - {"_abc_impl"} == meant


class NewForward(nn.Module):
    def forward(self, input_ids, cache=None, **kwargs): ...


class OldForward(nn.Module):
    def forward(self, input_ids, past_key_values=None, **kwargs): ...


@pytest.mark.parametrize(
    ("model", "name"), [(NewForward, "cache"), (OldForward, "past_key_values")]
)
def test_the_cache_goes_by_the_name_that_the_forward_has(model, name):
    assert cache_argument(model()) == name
