"""Distil the independent dense draft (Qwen3 architecture) on the target's distributions."""

from pathlib import Path

import torch
from tqdm import tqdm

from training.data import SEED
from training.optim import Budget, Optimizers
from training.teacher import TeacherBatches, soft_targets

BATCH_ROWS = 16
ARGMAX_WEIGHT = 0.3


def draft_config(vocab_size: int, eos: int, pad: int, layers: int = 2):
    """About 1.2 M parameters, half of them the tied embedding."""
    from transformers import Qwen3Config

    wide = layers == 1
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=192 if wide else 160,
        intermediate_size=512 if wide else 400,
        num_hidden_layers=layers,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def train_draft(
    teacher, tokenizer, run_dir: Path, budget: Budget, device: str = "cpu", layers: int = 2
):
    """Cross entropy against the target's (sharpened) distribution; returns the fp32 model."""
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(SEED)
    config = draft_config(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, layers)
    model = Qwen3ForCausalLM(config).float().to(device).train()
    optimizers = Optimizers(model)
    batches = TeacherBatches(run_dir)
    lm_head = teacher.get_output_embeddings().weight
    log = (run_dir / f"draft{layers}.log").open("w")
    with tqdm(
        total=100.0, desc="draft", bar_format="{l_bar}{bar}| {elapsed} {postfix}", mininterval=5
    ) as bar:
        while budget.progress < 1.0:
            ids, features = batches.batch(BATCH_ROWS, device)
            with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
                logits = model(input_ids=ids, use_cache=False).logits.float()
            targets = soft_targets(features, lm_head, ARGMAX_WEIGHT)
            real = ids != tokenizer.pad_token_id
            loss = torch.nn.functional.cross_entropy(logits[real], targets[real])
            loss.backward()
            optimizers.step(budget.lr_factor(decay_from=0.3))
            budget.tokens_done += ids.numel()
            with torch.no_grad():
                agree = (logits.argmax(-1) == targets.argmax(-1))[real].float().mean().item()
            log.write(f"{budget.tokens_done} {budget.seconds:.0f} {loss.item():.4f} {agree:.4f}\n")
            log.flush()
            bar.n = 100 * budget.progress
            bar.set_postfix_str(
                f"loss {loss.item():.3f} agree {agree:.3f} tokens {budget.tokens_done / 1e6:.2f}M"
            )
    return model
