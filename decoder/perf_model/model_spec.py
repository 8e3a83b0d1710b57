"""Parameters and bytes of a transformer by component; ``config_spec`` reads them from a config."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

# Bytes of memory that one weight takes in a format, its share of the scales included: written out,
# because neither torch nor the kernels are needed here; a test holds them to the formats.
# int8 and int4 with a scale for 32 weights, as `moesd_kernels.quantize` makes them.
WEIGHT_BYTES = {
    "bf16": 2.0,
    "fp16": 2.0,
    "fp32": 4.0,
    "fp8": 1 + 4 / 128**2,
    "int8": 1 + 2 / 32,
    "int4": 1 / 2 + 2 / 32,
    "mxfp4": 1 / 2 + 1 / 32,
    "q8_0": 34 / 32,
    "q4_0": 18 / 32,
    "q4_1": 20 / 32,
    "q5_0": 22 / 32,
    "q5_1": 24 / 32,
    "q4_k": 144 / 256,
    "q5_k": 176 / 256,
    "q6_k": 210 / 256,
}
EXPERTS_ONLY = frozenset({"mxfp4"})  # gpt-oss: the rest of the model has 16 bits


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer; counts are parameters, not bytes.

    Args:
        attention: parameters of its attention's or recurrence's projections.
        query_width: query heads x (key dim + value dim) / 2, for attention FLOPs.
        kv_width: cached elements per token.
        window: sliding window in tokens, or None.
        dense: parameters every token multiplies with in the MLP (dense MLP, shared expert, router).
        expert: parameters of ONE routed expert; 0 for a dense layer.
        state_width, conv_width: elements that a row keeps of a recurrence: its state, and the last
            inputs of a convolution.
        ring_width: elements kept of a token that may yet be rejected, to move the state on.
    """

    attention: int
    query_width: int
    kv_width: int
    window: int | None
    dense: int
    expert: int = 0
    num_experts: int = 0
    top_k: int = 0
    state_width: int = 0
    conv_width: int = 0
    ring_width: int = 0

    @property
    def total(self) -> int:
        """All parameters of the layer."""
        return self.attention + self.dense + self.num_experts * self.expert

    @property
    def active(self) -> int:
        """Parameters one token multiplies with."""
        return self.attention + self.dense + self.top_k * self.expert

    @property
    def launches(self) -> int:
        """Kernels a plain implementation launches: norms, projections, rope, attention, MLP."""
        return (8 if self.attention else 0) + (10 if self.num_experts else 6 if self.dense else 0)


@dataclass(frozen=True)
class ModelSpec:
    """A causal language model, component by component.

    Args:
        embedding: input embedding parameters (looked up, not multiplied).
        head: output projection parameters, read by every forward even when tied.
        dense_bytes, expert_bytes, kv_bytes: bytes per parameter / cached element.
        embedding_bytes: of a parameter that is looked up, where the multiplied ones are packed and
            a head that shares its matrix is packed beside it; None: as a dense one.
        repeated: parameters of layers that share them with others, beyond their first use.
        state_bytes: bytes per element of a recurrent state.
    """

    name: str
    hidden: int
    vocab: int
    layers: tuple[LayerSpec, ...]
    embedding: int
    head: int
    tied: bool
    dense_bytes: float = 2.0
    expert_bytes: float = 2.0
    kv_bytes: float = 2.0
    repeated: int = 0
    state_bytes: float = 4.0
    embedding_bytes: float | None = None

    @property
    def total_params(self) -> int:
        """All parameters, a tied head and shared layers counted once."""
        outer = self.embedding + (0 if self.tied else self.head) - self.repeated
        return outer + sum(layer.total for layer in self.layers)

    @property
    def active_params(self) -> int:
        """Parameters used by one token, embeddings included (the usual "A" in a model's name)."""
        outer = self.embedding + (0 if self.tied else self.head) - self.repeated
        return outer + sum(layer.active for layer in self.layers)

    @cached_property
    def layer_groups(self) -> tuple[tuple[LayerSpec, int], ...]:
        """Distinct layers and how often each occurs."""
        return tuple(Counter(self.layers).items())

    @property
    def moe(self) -> LayerSpec | None:
        """The first layer with experts, or None for a dense model."""
        return next((layer for layer in self.layers if layer.num_experts), None)

    @property
    def dense_weight_bytes(self) -> float:
        """Bytes every forward reads whatever the routing: attention, dense MLPs, router, head."""
        params = self.head + sum(layer.attention + layer.dense for layer in self.layers)
        return params * self.dense_bytes

    @property
    def one_expert_bytes(self) -> float:
        """Bytes of one expert in every MoE layer together: what one more active expert loads."""
        return sum(layer.expert for layer in self.layers) * self.expert_bytes

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights."""
        experts = sum(layer.num_experts * layer.expert for layer in self.layers)
        size = (self.total_params - experts) * self.dense_bytes + experts * self.expert_bytes
        if self.embedding_bytes is None:
            return size
        counted = 0.0 if self.tied else self.embedding * self.dense_bytes
        return size - counted + self.embedding * self.embedding_bytes

    def weight_bytes_per_rank(self, ranks: int) -> float:
        """Bytes of what the fullest of ``ranks`` holds that share each layer's experts."""
        away = sum(
            (x.num_experts - math.ceil(x.num_experts / ranks)) * x.expert for x in self.layers
        )
        return self.weight_bytes - away * self.expert_bytes

    def kv_cache_bytes(self, context: int) -> float:
        """Bytes of one sequence's cache at ``context`` tokens."""
        return self.kv_bytes * sum(
            layer.kv_width * min(context, layer.window or context) for layer in self.layers
        )

    def recurrent_bytes(self, tokens: int) -> float:
        """Bytes that a row keeps of its recurrent layers, with ``tokens`` yet to be accepted."""
        return sum(
            layer.state_width * self.state_bytes
            + (layer.conv_width + tokens * layer.ring_width) * self.kv_bytes
            for layer in self.layers
        )

    def with_top_k(self, top_k: int) -> ModelSpec:
        """The same model with another number of experts per token."""
        moe = self.moe
        if moe is None or not 1 <= top_k <= moe.num_experts:
            limit = "no experts" if moe is None else f"{moe.num_experts} experts"
            raise ValueError(f"top_k {top_k} does not fit {self.name}, which has {limit}")
        layers = [replace(x, top_k=top_k) if x.num_experts else x for x in self.layers]
        return replace(self, layers=tuple(layers))

    @property
    def products(self) -> str:
        """dtype of the matrix products: that of plain numbers, in which caches are kept."""
        return "fp32" if self.kv_bytes == WEIGHT_BYTES["fp32"] else "bf16"

    def with_weight_bytes(
        self,
        dense: float,
        expert: float | None = None,
        embedding: float | None = None,
        plain: float | None = None,
    ) -> ModelSpec:
        """The same model stored with other bytes per parameter (4 fp32, 2 bf16, 1 fp8).

        Args:
            dense, embedding: as the fields.
            expert: likewise; None is as dense.
            plain: of numbers that are not packed, as those in caches are; None is as before.
        """
        return replace(
            self,
            dense_bytes=dense,
            expert_bytes=dense if expert is None else expert,
            embedding_bytes=embedding,
            kv_bytes=self.kv_bytes if plain is None else plain,
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; equal layers are stored once with their count."""
        data = asdict(replace(self, layers=()))
        data["layers"] = [{**asdict(layer), "count": n} for layer, n in self.layer_groups]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """The inverse of ``to_json``; layers come back grouped.

        Raises:
            ValueError: missing or unknown fields.
        """
        try:
            layers: list[LayerSpec] = []
            for entry in data["layers"]:
                fields = dict(entry)
                layers += [LayerSpec(**{k: v for k, v in fields.items() if k != "count"})] * int(
                    fields["count"]
                )
            return cls(**{**data, "layers": tuple(layers)})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a model spec: {error!r}") from error


def eagle_spec(target: ModelSpec) -> ModelSpec:
    """An EAGLE-1 head for ``target``: one dense decoder layer, a 2H -> H input, the target's head.

    Heads are published in 16 bits, for quantised targets too. The MLP is 3.5 x hidden wide, as in
    the published heads of Llama- and Mixtral-class targets.
    """
    # Of a hybrid, a layer with attention: heads keep no recurrent state.
    like = next((layer for layer in target.layers if layer.kv_width), target.layers[0])
    mlp = 3 * target.hidden * int(3.5 * target.hidden)
    layer = LayerSpec(
        like.attention, like.query_width, like.kv_width, None, dense=mlp + 2 * target.hidden**2
    )
    head = replace(target, name=f"{target.name}-eagle", layers=(layer,), tied=True, repeated=0)
    return head.with_weight_bytes(max(target.dense_bytes, WEIGHT_BYTES["bf16"]))
