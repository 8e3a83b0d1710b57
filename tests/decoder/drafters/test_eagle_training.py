"""The decoder's head computes what the training script's own forward computed."""

from __future__ import annotations

from pathlib import Path

import torch
from support.heads.depths import check_depths

from decoder.drafters.heads.eagle_head import EagleHead
from decoder.drafters.heads.eagle_loader import is_eagle_checkpoint, load_eagle
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
    check_depths(head, tokens, features, expected)
