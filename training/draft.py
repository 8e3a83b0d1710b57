"""Distil the independent dense draft (Qwen3 architecture) on the target's distributions."""

from pathlib import Path

import torch

from training.data import SEED
from training.optim import Budget, Optimizers, spend
from training.teacher import TeacherBatches, agreement, distillation_loss

BATCH_ROWS = 8
HIDDEN = 128


def draft_config(vocab_size: int, eos: int, pad: int):
    """0.8 M parameters, most of them the tied embedding: a step must cost little.

    Two layers, because one attention layer cannot look up what followed the last time a text came
    to this place, and small targets repeat themselves. A window of 64 tokens keeps a step as cheap,
    and as good, in a long text as in the short rows that the draft is trained on.
    """
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=2048,
        use_sliding_window=True,
        sliding_window=64,
        max_window_layers=0,
        tie_word_embeddings=True,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def principal(embedding: torch.Tensor) -> torch.Tensor:
    """The target's embedding ``[V, H]`` along its strongest directions: ``[V, HIDDEN]``."""
    directions = torch.linalg.svd(embedding, full_matrices=False).Vh[:HIDDEN]
    return embedding @ directions.T


def train_draft(target_embedding, tokenizer, run_dir: Path, budget: Budget, device: str = "cpu"):
    """Cross entropy against the target's (sharpened) distribution; returns the fp32 model."""
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(SEED)
    config = draft_config(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    model = Qwen3ForCausalLM(config).float().to(device).train()
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(principal(target_embedding))
    optimizers = Optimizers(model, adam_lr=1e-3)
    batches = TeacherBatches(run_dir)

    def step() -> dict[str, float]:
        rows = batches.batch(BATCH_ROWS, device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            logits = model(input_ids=rows.ids, use_cache=False).logits.float()
        real = rows.ids != tokenizer.pad_token_id
        loss = distillation_loss(logits, rows.top_ids, rows.top_probs, real)
        loss.backward()
        optimizers.step(budget.lr_factor(decay_from=0.3))
        budget.tokens_done += rows.ids.numel()
        return {"loss": loss.item(), "agree": agreement(logits, rows.top_ids, real)}

    log = run_dir / "draft.log"
    log.unlink(missing_ok=True)
    spend(budget, log, step)
    return model
