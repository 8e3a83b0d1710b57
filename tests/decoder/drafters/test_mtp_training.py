"""The decoder's head computes what the training script's own forward computed."""

from __future__ import annotations

from pathlib import Path

import torch
from support.tiny import tiny_model

from decoder.drafters.heads.mtp_loader import load_mtp
from decoder.model.attention import Placement, placed
from decoder.model.cache import RaggedCache
from training.mtp import Mtp, head_config, save_mtp
from training.mtp import load_mtp as load_trained

LENGTH, DEPTHS = 10, 3


@torch.no_grad()
def test_predictions_of_every_draft_depth(tmp_path: Path) -> None:
    target = tiny_model("qwen3_moe")
    torch.manual_seed(0)
    model = Mtp(head_config(target.config))
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.add_(0.1 * torch.randn_like(weight))
    save_mtp(model, target.config, tmp_path)
    trained = load_trained(target.config, tmp_path)
    embedding = target.get_input_embeddings()
    H = embedding.weight.shape[1]
    tokens, features = torch.randint(0, 64, (2, LENGTH)), torch.randn(2, LENGTH, H)
    expected = trained.depths(embedding(tokens), features, DEPTHS)

    (head,) = load_mtp(tmp_path, target)
    cache, rows = RaggedCache(3, 64), torch.tensor([2, 0])

    def run(ids: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cache.select(rows, positions)
        placement = Placement(rows, positions, LENGTH)
        with placed(placement):
            return head(ids, hidden, cache, placement)

    for end in range(1, LENGTH - DEPTHS):
        positions = torch.arange(end).repeat(2, 1)
        hidden = run(tokens[:, :end], features[:, :end], positions)
        torch.testing.assert_close(hidden, expected[0][:, :end], atol=1e-5, rtol=1e-4)
        for depth in range(1, DEPTHS):
            at = end - 1 + depth
            hidden = run(tokens[:, at, None], hidden[:, -1:], torch.full((2, 1), at))
            torch.testing.assert_close(hidden[:, 0], expected[depth][:, at], atol=1e-5, rtol=1e-4)
