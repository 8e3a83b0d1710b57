"""``MoE``: a block that computes, made anew, of a transformers block, or of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesd_kernels.experts.api import fused_experts
from moesd_kernels.hooks.routers import router_logits

from .block import flatten
from .config import MoEConfig
from .parts import Experts, Router, SharedExpert
from .trial import recognise_block


class MoE(nn.Module):
    """``sum_k weight_k * expert_k(x) + shared(x)`` over the experts the router chooses.

    Args:
        config: the block's shape.
        backend: back-end of the experts; see ``moesd_kernels.fused_experts``.
        batch_invariant: make routed experts' rows independent of the rest of the batch.
        device: where parameters are made.
        dtype: of the parameters.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        backend: str = "auto",
        batch_invariant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config, self.backend, self.batch_invariant = config, backend, batch_invariant
        self.gate = Router(config, **factory)
        self.experts = Experts(config, **factory)
        self.shared_expert: nn.Module | None = None
        self.shared_expert_gate: nn.Module | None = None
        if config.shared_intermediate_size:
            self.shared_expert = SharedExpert(config, **factory)
        if config.shared_gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from N(0, 1 / fan-in); biases and quantised weights become zero."""
        stored = {f"experts.{name}" for name in self.experts.scale_names}
        for name, parameter in self.named_parameters():
            if "bias" in name or name in stored:
                nn.init.zeros_(parameter)
            else:
                axis = 1 if self.config.spec.transposed and name.startswith("experts") else -1
                nn.init.normal_(parameter, std=parameter.shape[axis] ** -0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map [..., H] to [..., H], row by row.

        Raises:
            ValueError: the last dimension is not H.
        """
        config = self.config
        if hidden_states.shape[-1] != config.hidden_size:
            raise ValueError(
                f"hidden_states must be [..., {config.hidden_size}], "
                f"got {tuple(hidden_states.shape)}"
            )
        x = hidden_states.reshape(-1, config.hidden_size)
        logits = router_logits(x, self.gate.weight, self.gate.bias, config.router)
        correction = getattr(self.gate, "e_score_correction_bias", None)
        routed = config.router.select(logits, correction, dtype=x.dtype)
        out = fused_experts(
            x,
            self.experts.gate_up_proj,
            self.experts.down_proj,
            routed.ids,
            routed.weights,
            gate_up_bias=self.experts.gate_up_proj_bias,
            down_bias=self.experts.down_proj_bias,
            gate_up_scale=getattr(self.experts, "gate_up_proj_scale", None),
            down_scale=getattr(self.experts, "down_proj_scale", None),
            spec=config.spec,
            backend=self.backend,
            batch_invariant=self.batch_invariant,
        )
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            if self.shared_expert_gate is not None:
                shared = F.sigmoid(self.shared_expert_gate(x)) * shared
            out = out + shared
        return out.view(hidden_states.shape)

    @classmethod
    def from_transformers(cls, block: nn.Module, **options: Any) -> MoE:
        """A block that shares the parameters of a transformers MoE block.

        Args:
            block: has ``experts``, ``gate`` (or ``router``) and maybe a shared expert: the blocks
                of Mixtral, Qwen2/3-MoE, OLMoE, gpt-oss, DeepSeek-V3, GLM-4 and their relatives.
            options: ``backend``, ``batch_invariant``.

        Raises:
            ValueError: a part is missing, its router or gate is not one of ours, or it computes
                something else of its parts.
        """
        config, parts = recognise_block(block, MoE)
        moe = cls(config, device="meta", **options)
        moe.load_state_dict(dict(flatten(parts)), strict=True, assign=True)
        return moe.train(block.training)

    @classmethod
    def from_safetensors(
        cls,
        path: str | Path,
        config: MoEConfig | None = None,
        *,
        layer: int | None = None,
        prefix: str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> MoE:
        """One layer's block of a Hugging Face checkpoint, of which nothing else is read.

        Names, shapes and types are compared with ``config`` before a weight is read. FP8 experts
        with a scale for 128 x 128 weights and MXFP4 ones stay as they are stored; other FP8
        weights of the block become numbers.

        Args:
            path: the checkpoint's folder, with or without index, or a ``.safetensors`` file.
            config: the block's shape; of the ``config.json`` beside the files when None.
            layer: the layer whose block is loaded.
            prefix: instead of ``layer``: what the block's names begin with, as in
                ``"model.layers.3.mlp."``. With neither the checkpoint is a block's state dict.
            dtype: convert what is not quantised to this dtype; as stored when None.
            options: ``backend``, ``batch_invariant``.

        Raises:
            FileNotFoundError: no safetensors file at ``path``, one that the index names is not
                there, or no ``config.json``.
            KeyError: a tensor of the block is missing; the message names it.
            ValueError: a file cannot be read, there is no such block, its family is not known, a
                tensor's shape or type does not fit ``config``, or ``config`` has no place for it.
        """
        from .layout import Layout
        from .places import block_at, layer_in, prefix_of
        from .shards import Shards

        path = Path(path)
        with Shards(path) as shards:
            prefix = prefix_of(shards, layer, prefix)
            if config is None:
                folder = path if path.is_dir() else path.parent
                config, _ = recognise_block(block_at(folder, layer_in(prefix)), MoE)
            layout = Layout(shards, prefix, config)
            moe = cls(layout.config, device="meta", **options)
            wanted = moe.state_dict()
            layout.check(wanted)
            state = layout.read(wanted, dtype)
        moe.load_state_dict(state, strict=True, assign=True)
        return moe
