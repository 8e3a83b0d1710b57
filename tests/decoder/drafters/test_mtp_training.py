"""The decoder's head computes what the training script's own forward computed."""

from __future__ import annotations

from pathlib import Path

import torch
from support.heads.depths import check_depths
from support.tiny import tiny_model

from decoder.drafters.heads.mtp_loader import load_mtp
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
    check_depths(head, tokens, features, expected)
