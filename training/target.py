"""Train the sparse-MoE target (Qwen3-MoE architecture, fine-grained experts) on the corpus."""

from functools import partial
from pathlib import Path

import torch

from training import experts
from training.checkpoint import load_checkpoint, save_checkpoint
from training.data import SEED, TokenStream
from training.optim import Budget, Optimizers, spend

SHARES = {"code": 0.8, "prose": 0.2}
BATCH_TOKENS = 4096
SHORT, LONG = 256, 512  # row lengths: short while most is learnt, then long
LONG_FROM = 0.65  # progress at which rows become long


def target_config(vocab_size: int, eos: int, pad: int):
    """32 experts of width 48 per layer, 4 per token: 9.3 M parameters, 3.2 M active."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    config.head_dim = 64
    return config


def new_target(tokenizer):
    """A freshly initialised target in fp32 with the training expert layer."""
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(SEED)
    config = target_config(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    config._experts_implementation = experts.register()
    model = Qwen3MoeForCausalLM(config).float()
    with (
        torch.no_grad()
    ):  # residual branches start at zero: deep and shallow layers learn from the first step
        for name, p in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                p.zero_()
    return model


def save_bf16(model, tokenizer, out: Path) -> None:
    """Write a ``from_pretrained`` directory: bf16 weights, greedy defaults, tokenizer."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = type(model.config).from_dict(model.config.to_dict())
    copy = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    copy.load_state_dict({k: v.to(torch.bfloat16) for k, v in model.state_dict().items()})
    copy.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out)


def train_target(
    tokens,
    tokenizer,
    run_dir: Path,
    budget: Budget,
    device: str = "cpu",
    preview: Path | None = None,
):
    """Train until the budget is spent, resuming from ``run_dir/target.pt``; return the model."""
    model = new_target(tokenizer).to(device).train()
    optimizers = Optimizers(model)
    stream = TokenStream(tokens["train"], SHARES, tokenizer.eos_token_id)
    checkpoint = run_dir / "target.pt"
    if checkpoint.exists():
        state = load_checkpoint(checkpoint)
        model.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        stream.load_state_dict(state["stream"])
        budget.tokens_done, budget.seconds_before = state["tokens"], state["seconds"]

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": optimizers.state_dict(),
            "stream": stream.state_dict(),
            "tokens": budget.tokens_done,
            "seconds": budget.seconds,
        }
        save_checkpoint(state, checkpoint)
        if preview is not None:
            save_bf16(model, tokenizer, preview)

    step = partial(training_step, model, stream, optimizers, budget, device)
    spend(budget, run_dir / "target.log", step, save)
    return model


def training_step(
    model, stream: TokenStream, optimizers: Optimizers, budget: Budget, device: str
) -> dict[str, float]:
    """One batch, one update; cross entropy, load-balancing loss, gradient norm."""
    length = LONG if budget.progress >= LONG_FROM else SHORT
    batch = stream.batch(BATCH_TOKENS // length, length).to(device)
    with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
        out = model(input_ids=batch[:, :-1], use_cache=False, output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(
            out.logits.float().flatten(0, 1), batch[:, 1:].flatten()
        )
        (loss + model.config.router_aux_loss_coef * out.aux_loss).backward()
    norm = optimizers.step(budget.lr_factor())
    budget.tokens_done += batch.shape[0] * length
    return {"loss": loss.item(), "aux": out.aux_loss.item(), "norm": norm}
