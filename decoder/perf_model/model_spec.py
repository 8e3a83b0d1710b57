"""Parameters, bytes and FLOPs of a transformer by component, from its config alone.

No weights are read, so models far too large for the machine can be planned for. Norm and gate
vectors are counted only where they are more than rounding: totals agree with the real models to
about 0.1 %. Recurrent and linear-attention layers are refused: their state cannot be rolled back by
masking, so the decoder does not run them either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

_UNGATED = {"opt", "gpt2", "gpt_neox", "gpt_neo", "phi", "starcoder2", "falcon", "nemotron"}
_QKV_BIAS = {"qwen2", "qwen2_moe", "qwen1_5_moe"}
MXFP4_BYTES = 17 / 32  # 4 bits and one shared 8-bit exponent per 32 values


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer; counts are parameters, not bytes.

    Args:
        attention: parameters of its projections.
        query_width: query heads x (key dim + value dim) / 2, for attention FLOPs.
        kv_width: cached elements per token.
        window: sliding window in tokens, or None.
        dense: parameters every token multiplies with in the MLP (dense MLP, shared expert, router).
        expert: parameters of ONE routed expert; 0 for a dense layer.
    """

    attention: int
    query_width: int
    kv_width: int
    window: int | None
    dense: int
    expert: int = 0
    num_experts: int = 0
    top_k: int = 0

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
        return 18 if self.num_experts else 14


@dataclass(frozen=True)
class ModelSpec:
    """A causal language model, component by component.

    Args:
        embedding: input embedding parameters (looked up, not multiplied).
        head: output projection parameters, read by every forward even when tied.
        dense_bytes, expert_bytes, kv_bytes: bytes per parameter / cached element.
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

    @property
    def total_params(self) -> int:
        """All parameters, a tied head counted once."""
        outer = self.embedding + (0 if self.tied else self.head)
        return outer + sum(layer.total for layer in self.layers)

    @property
    def active_params(self) -> int:
        """Parameters used by one token, embeddings included (the usual "A" in a model's name)."""
        outer = self.embedding + (0 if self.tied else self.head)
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
        return (self.total_params - experts) * self.dense_bytes + experts * self.expert_bytes

    def kv_cache_bytes(self, context: int) -> float:
        """Bytes of one sequence's cache at ``context`` tokens."""
        return self.kv_bytes * sum(
            layer.kv_width * min(context, layer.window or context) for layer in self.layers
        )

    def with_top_k(self, top_k: int) -> ModelSpec:
        """The same model with another number of experts per token."""
        moe = self.moe
        if moe is None or not 1 <= top_k <= moe.num_experts:
            limit = "no experts" if moe is None else f"{moe.num_experts} experts"
            raise ValueError(f"top_k {top_k} does not fit {self.name}, which has {limit}")
        layers = [replace(x, top_k=top_k) if x.num_experts else x for x in self.layers]
        return replace(self, layers=tuple(layers))

    def with_weight_bytes(self, dense: float, expert: float | None = None) -> ModelSpec:
        """The same model stored with other bytes per parameter (4 fp32, 2 bf16, 1 fp8)."""
        return replace(self, dense_bytes=dense, expert_bytes=dense if expert is None else expert)

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


def spec_from_config(config: Any, name: str | None = None) -> ModelSpec:
    """Read a transformers config object, or the dict of a ``config.json``.

    Raises:
        NotImplementedError: layers with recurrent state.
        ValueError: a field the count needs is missing.
    """
    fields = _fields(config)
    kind = fields.get("model_type", "")
    num_layers = _need(fields, "num_hidden_layers", "n_layer")
    for layer_type in set(fields.get("layer_types") or ()):
        if "attention" not in layer_type or layer_type == "linear_attention":
            raise NotImplementedError(
                f"layer type {layer_type!r} of {kind!r}: recurrent state cannot be rolled back"
            )
    hidden = _need(fields, "hidden_size", "n_embd")
    vocab = _need(fields, "vocab_size")
    embed_width = fields.get("word_embed_proj_dim") or hidden
    embedding = vocab * embed_width
    if kind in ("opt", "gpt2"):
        embedding += (fields.get("max_position_embeddings") or 0) * hidden
    if embed_width != hidden:
        embedding += 2 * embed_width * hidden
    dense_bytes, expert_bytes = _weight_bytes(fields)
    return ModelSpec(
        name=name or fields.get("_name_or_path") or kind or "model",
        hidden=hidden,
        vocab=vocab,
        layers=tuple(_layer(fields, kind, hidden, index) for index in range(num_layers)),
        embedding=embedding,
        head=vocab * embed_width,
        tied=bool(fields.get("tie_word_embeddings", kind in ("opt", "gpt2"))),
        dense_bytes=dense_bytes,
        expert_bytes=expert_bytes,
    )


def eagle_spec(target: ModelSpec) -> ModelSpec:
    """An EAGLE-1 head for ``target``: one dense decoder layer, a 2H -> H input, the target's head.

    The MLP is 3.5 x hidden wide, as in the published heads of Llama- and Mixtral-class targets.
    """
    first = target.layers[0]
    mlp = 3 * target.hidden * int(3.5 * target.hidden)
    layer = replace(
        first, dense=mlp + 2 * target.hidden**2, expert=0, num_experts=0, top_k=0, window=None
    )
    return replace(target, name=f"{target.name}-eagle", layers=(layer,), tied=True)


def _fields(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        kind = config.get("model_type")
        if kind:
            from transformers import AutoConfig

            try:  # fills the defaults that a config.json leaves out
                rest = {key: value for key, value in config.items() if key != "model_type"}
                config = AutoConfig.for_model(kind, **rest)
            except (ValueError, KeyError):  # a model this transformers does not know
                return config.get("text_config") or config
        else:
            return config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    if not hasattr(config, "to_dict"):
        raise ValueError(f"config must be a transformers config or a dict, got {type(config)}")
    fields: dict[str, Any] = config.to_dict()
    for old, new in getattr(config, "attribute_map", {}).items():
        fields.setdefault(old, fields.get(new))
    fields.setdefault("model_type", getattr(config, "model_type", ""))
    return fields


def _need(fields: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if fields.get(name) is not None:
            return int(fields[name])
    raise ValueError(f"config must have {' or '.join(names)}, got fields {sorted(fields)[:40]}")


def _weight_bytes(fields: Mapping[str, Any]) -> tuple[float, float]:
    """Bytes per dense and per expert parameter; bf16 unless a quantization_config says otherwise."""
    method = str((fields.get("quantization_config") or {}).get("quant_method", ""))
    if method == "mxfp4":  # gpt-oss: the experts only
        return 2.0, MXFP4_BYTES
    if "fp8" in method:
        return 1.0, 1.0
    dtype = str(fields.get("dtype") or fields.get("torch_dtype") or "bfloat16")
    return (4.0, 4.0) if "float32" in dtype else (2.0, 2.0)


def _layer(fields: Mapping[str, Any], kind: str, hidden: int, index: int) -> LayerSpec:
    attention, query_width, kv_width = _attention(fields, kind, hidden)
    window = fields.get("sliding_window") if fields.get("use_sliding_window", True) else None
    layer_types = fields.get("layer_types")
    if layer_types and layer_types[index] != "sliding_attention":
        window = None
    base = LayerSpec(attention, query_width, kv_width, window, dense=0)
    if not _is_sparse(fields, index):
        inner = _need(fields, "intermediate_size", "ffn_dim", "n_inner")
        matrices = 2 if kind in _UNGATED else 3
        return replace(base, dense=matrices * hidden * inner)
    experts = _num_experts(fields)
    inner = int(fields.get("moe_intermediate_size") or _need(fields, "intermediate_size"))
    shared = int(fields.get("shared_expert_intermediate_size") or 0)
    shared += int(fields.get("n_shared_experts") or 0) * inner
    bias = 2 * inner + hidden if kind == "gpt_oss" else 0
    return replace(
        base,
        dense=3 * hidden * shared + hidden * experts,
        expert=3 * hidden * inner + bias,
        num_experts=experts,
        top_k=_need(fields, "num_experts_per_tok", "moe_topk", "top_k_experts"),
    )


def _num_experts(fields: Mapping[str, Any]) -> int:
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if fields.get(name):
            return int(fields[name])
    return 0


def _is_sparse(fields: Mapping[str, Any], index: int) -> bool:
    if not _num_experts(fields):
        return False
    types = fields.get("mlp_layer_types")
    if types:
        return bool(types[index] == "sparse")
    if index < (fields.get("first_k_dense_replace") or 0):
        return False
    if index in (fields.get("mlp_only_layers") or ()):
        return False
    step = fields.get("decoder_sparse_step") or 1
    if (index + 1) % step:
        return False
    return index % (fields.get("moe_layer_freq") or 1) == 0


def _attention(fields: Mapping[str, Any], kind: str, hidden: int) -> tuple[int, int, int]:
    """Projection parameters, query width (see LayerSpec), cached elements per token."""
    heads = _need(fields, "num_attention_heads", "n_head")
    if fields.get("kv_lora_rank"):
        return _latent_attention(fields, hidden, heads)
    kv_heads = int(fields.get("num_key_value_heads") or heads)
    head_dim = int(fields.get("head_dim") or hidden // heads)
    params = 2 * hidden * head_dim * (heads + kv_heads)
    if fields.get("attention_bias") or kind in _QKV_BIAS:
        params += head_dim * (heads + 2 * kv_heads)
    return params, heads * head_dim, 2 * kv_heads * head_dim


def _latent_attention(fields: Mapping[str, Any], hidden: int, heads: int) -> tuple[int, int, int]:
    """Multi-head latent attention, cached in latent form and computed absorbed (as engines do)."""
    rank, rope = int(fields["kv_lora_rank"]), _need(fields, "qk_rope_head_dim")
    nope, value = _need(fields, "qk_nope_head_dim"), _need(fields, "v_head_dim")
    query_out = heads * (nope + rope)
    query_rank = int(fields.get("q_lora_rank") or 0)
    query = query_rank * (hidden + query_out) if query_rank else hidden * query_out
    params = query + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
    return params, heads * (2 * rank + rope) // 2, rank + rope
