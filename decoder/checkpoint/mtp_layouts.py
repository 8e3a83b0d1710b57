"""How published checkpoints name the tensors of their multi-token-prediction (MTP) heads.

A head normalises the embedding of the next token and the target's last hidden state (after its
final norm), joins and projects them, and runs a decoder layer of the target's family; its own norm,
or the target's, precedes the output projection. transformers drops all that when it loads a target.

Sources: DeepSeek-V3 (arXiv 2412.19437, section 2.2), and the tensor names of the checkpoints.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MtpLayout:
    """Names of head ``{i}``, counted from 0; ``{layer}`` is the target's number of layers + i.

    Attributes:
        family: whose it is, for messages.
        layer: what the names of the decoder layer's tensors begin with.
        embedding_norm, hidden_norm, projection: modules before the layer.
        norm: the module after it; ``None``: the target's final norm.
        hidden_first: the projection reads the hidden state first, then the embedding.
        embedding, lm_head: modules that a head may bring; ``None``: it takes the target's.
    """

    family: str
    layer: str
    embedding_norm: str
    hidden_norm: str
    projection: str
    norm: str | None
    hidden_first: bool = False
    embedding: str | None = None
    lm_head: str | None = None

    def parts(self, depth: int, i: int) -> dict[str, str]:
        """The head's modules but for its layer: our name to the checkpoint's."""
        ours = ("embedding_norm", "hidden_norm", "projection", "norm", "embedding", "lm_head")
        return {
            name: named.format(i=i, layer=depth + i)
            for name in ours
            if (named := getattr(self, name)) is not None
        }

    def tensors(self, names: Collection[str], depth: int, i: int) -> dict[str, str]:
        """What a checkpoint has of head ``i``: our name of a tensor to its own.

        Args:
            names: of the checkpoint's tensors.
            depth: the target's number of layers.
            i: which head.

        Returns:
            Nothing where it has no projection or no layer. The layer's names begin with ``layer.``,
            the others with a field of this class.
        """
        layer = self.layer.format(i=i, layer=depth + i)
        found = {
            f"{ours}{name.removeprefix(theirs)}": name
            for ours, theirs in self.parts(depth, i).items()
            for name in names
            if name.startswith(f"{theirs}.")
        }
        taken = set(found.values())
        rest = {
            f"layer.{name.removeprefix(layer)}": name
            for name in names
            if name.startswith(layer) and name not in taken
        }
        return found | rest if rest and "projection.weight" in found else {}


MTP_LAYOUTS = (
    MtpLayout(
        "DeepSeek-V3, GLM-4",
        layer="model.layers.{layer}.",
        embedding_norm="model.layers.{layer}.enorm",
        hidden_norm="model.layers.{layer}.hnorm",
        projection="model.layers.{layer}.eh_proj",
        norm="model.layers.{layer}.shared_head.norm",
        embedding="model.layers.{layer}.embed_tokens",
        lm_head="model.layers.{layer}.shared_head.head",
    ),
    MtpLayout(
        "Qwen3-Next, Qwen3.5",
        layer="mtp.layers.{i}.",
        embedding_norm="mtp.pre_fc_norm_embedding",
        hidden_norm="mtp.pre_fc_norm_hidden",
        projection="mtp.fc",
        norm="mtp.norm",
    ),
    MtpLayout(
        "MiMo",
        layer="model.mtp_layers.{i}.",
        embedding_norm="model.mtp_layers.{i}.token_layernorm",
        hidden_norm="model.mtp_layers.{i}.hidden_layernorm",
        projection="model.mtp_layers.{i}.input_proj",
        norm="model.mtp_layers.{i}.final_layernorm",
        hidden_first=True,
    ),
    MtpLayout(
        "Ernie-4.5",
        layer="model.mtp_block.{i}.",
        embedding_norm="model.mtp_emb_norm.{i}",
        hidden_norm="model.mtp_hidden_norm.{i}",
        projection="model.mtp_linear_proj.{i}",
        norm=None,
    ),
)


def mtp_heads(names: Collection[str], depth: int) -> tuple[MtpLayout, list[dict[str, str]]] | None:
    """The layout of a checkpoint's heads and, per head, its tensors; ``None`` where it has none.

    Args:
        names: of the checkpoint's tensors.
        depth: the target's number of layers.
    """
    for layout in MTP_LAYOUTS:
        found = (layout.tensors(names, depth, i) for i in itertools.count())
        heads = list(itertools.takewhile(bool, found))
        if heads:
            return layout, heads
    return None
