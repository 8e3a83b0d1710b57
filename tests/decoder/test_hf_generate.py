"""``generate(custom_generate=...)`` returns what ``generate`` returns, batched."""

import pytest
import torch
from support.tiny import ragged_prompts, tiny_moe

from decoder.errors import UserError
from decoder.hf_generate import speculative

torch.set_num_threads(1)


def batch(side, count=4):
    prompts = ragged_prompts(count, seed=4)
    width = max(map(len, prompts))
    ids, mask = torch.zeros(count, width, dtype=torch.long), torch.zeros(count, width).long()
    for row, prompt in enumerate(prompts):
        part = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, part], mask[row, part] = torch.tensor(prompt), 1
    return ids, mask


@pytest.mark.parametrize("drafter", ["ngram", "self"])
def test_greedy_equals_generate(drafter):
    model = tiny_moe()
    ids, mask = batch("left")
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **options)
    method = speculative(drafter, 3, kernels=False)
    for _ in range(2):
        assert torch.equal(model.generate(ids, custom_generate=method, **options), expected)


def test_sampling_runs_and_refuses_what_it_cannot_do():
    model = tiny_moe()
    ids, mask = batch("left", 2)
    method = speculative("ngram", 2, kernels=False)
    out = model.generate(
        ids, attention_mask=mask, custom_generate=method, do_sample=True, top_k=5, max_new_tokens=6
    )
    assert out.shape[0] == 2
    assert torch.equal(out[:, : ids.shape[1]], ids)
    with pytest.raises(UserError, match="no_repeat_ngram_size=2 is not supported"):
        model.generate(
            ids, attention_mask=mask, custom_generate=method, no_repeat_ngram_size=2,
            max_new_tokens=4,
        )  # fmt: skip
