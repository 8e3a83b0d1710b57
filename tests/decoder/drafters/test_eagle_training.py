"""The decoder's head computes what the training script's own forward computed."""

from __future__ import annotations

from pathlib import Path

import torch

from decoder.drafters.heads.eagle_head import EagleHead
from decoder.drafters.heads.eagle_loader import is_eagle_checkpoint, load_eagle
from decoder.model.attention import Placement
from decoder.model.cache import RaggedCache
from training.eagle import CONFIG, Eagle, save_eagle
from training.eagle import load_eagle as load_trained

LENGTH, DEPTHS = 12, 3


@torch.no_grad()
def test_predictions_of_every_draft_depth(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Eagle()
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.add_(0.1 * torch.randn_like(weight))
    save_eagle(model, tmp_path)
    assert is_eagle_checkpoint(tmp_path)
    trained = load_trained(tmp_path)
    hidden_size = CONFIG["hidden_size"]
    embedding = torch.randn(64, hidden_size)
    tokens, features = torch.randint(0, 64, (2, LENGTH)), torch.randn(2, LENGTH, hidden_size)
    expected = trained.depths(embedding[tokens], features, DEPTHS)

    lm_head = torch.nn.Linear(hidden_size, 64, bias=False)
    head = EagleHead(load_eagle(tmp_path), embedding, lm_head)
    cache, rows = RaggedCache(3, 64), torch.tensor([2, 0])

    def run(ids: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cache.select(rows, positions)
        return head(ids, hidden, cache, Placement(rows, positions, LENGTH))

    for end in range(1, LENGTH - DEPTHS):
        positions = torch.arange(end).repeat(2, 1)
        hidden = run(tokens[:, :end], features[:, :end], positions)
        torch.testing.assert_close(hidden, expected[0][:, :end], atol=1e-5, rtol=1e-4)
        for depth in range(1, DEPTHS):
            at = end - 1 + depth
            hidden = run(tokens[:, at, None], hidden[:, -1:], torch.full((2, 1), at))
            torch.testing.assert_close(hidden[:, 0], expected[depth][:, at], atol=1e-5, rtol=1e-4)
