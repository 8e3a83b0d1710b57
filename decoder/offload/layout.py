"""Which bytes of which files an expert is made of.

transformers' own map of a checkpoint's names says what goes where; here is read what it says of
experts, as far as that is laying tensors one after the other. Two generations of layouts exist: all
experts of a layer in one tensor, and one tensor per expert and projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from decoder.checkpoint.weights import TensorHeader, require_whole_experts, tensor_headers
from decoder.errors import UserError

from .files import Extent, tensor_extents

_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# What joins tensors, and along which axis that leaves each of them in one piece.
_JOINING = {("MergeModulelist", 0), ("Concatenate", 1)}

_Parts = dict[str | None, list[str]]  # pattern of transformers' map -> tensors, by expert


class Projection(NamedTuple):
    """One projection of a layer's experts.

    Attributes:
        name: of the parameter in the experts module.
        shape: ``[E, ...]``.
        dtype: of its numbers.
        experts: by expert, the extents that follow each other in memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    experts: list[tuple[Extent, ...]]

    @property
    def expert_bytes(self) -> int:
        """Of one expert."""
        return sum(extent.size for extent in self.experts[0])


Layout = dict[str, list[Projection]]  # by the name of the experts module, in the order of layers


def files_of(layout: Layout) -> set[Path]:
    """The files that a layout is of."""
    projections = [projection for own in layout.values() for projection in own]
    return {x.file for p in projections for extents in p.experts for x in extents}


def read_layout(model: Any, files: Iterable[Path]) -> Layout:
    """Where the weights of a model's routed experts lie.

    Args:
        model: without memory; its modules say which weights there are.
        files: safetensors files that hold them.

    Raises:
        UserError: a model without routed experts of their own module, or weights that are missing,
            of another shape or type, or not as they lie in memory.
    """
    files = list(files)
    headers, extents = tensor_headers(files), tensor_extents(files)
    require_whole_experts(headers)
    layout: Layout = {}
    parameters: dict[str, Any] = {}
    for name, module in model.named_modules():
        if hasattr(module, "is_transposed"):  # transformers' experts interface
            own = {p: t for p, t in module.named_parameters(recurse=False) if p in _PROJECTIONS}
            parameters |= {f"{name}.{leaf}": parameter for leaf, parameter in own.items()}
    if not parameters:
        raise UserError(f"{type(model).__name__} has no routed experts to offload")
    parts, converters = _parts_of(model, parameters, headers)
    for name, parameter in parameters.items():
        module, _, leaf = name.rpartition(".")
        _require_joined(name, parts[name], converters)
        shape = tuple(parameter.shape)
        sources = _sources(name, parts[name], shape[0], converters)
        _require_fitting(name, [[headers[s] for s in own] for own in sources], parameter)
        experts = [tuple(extents[source] for source in own) for own in sources]
        if len(experts) < shape[0]:  # one tensor has them all
            experts = [(experts[0][0].nth(e, shape[0]),) for e in range(shape[0])]
        projection = Projection(leaf, shape, parameter.dtype, experts)
        layout.setdefault(module, []).append(projection)
    return layout


def _parts_of(
    model: Any, parameters: Mapping[str, Any], headers: Mapping[str, TensorHeader]
) -> tuple[dict[str, _Parts], dict[str, Any]]:
    """Which tensors make each parameter, and transformers' converters by their patterns."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings: list[Any] = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    names = model.state_dict()
    parts: dict[str, _Parts] = {name: {} for name in parameters}
    for source in sorted(headers, key=dot_natural_key):
        target, pattern = rename_source_key(
            source, renamings, converters, model.base_model_prefix, names
        )
        if target not in names and source in names:
            target, pattern = source, None
        if target in parts:
            parts[target].setdefault(pattern, []).append(source)
    return parts, {p: entry for entry in converters for p in entry.source_patterns}


def _require_joined(name: str, parts: _Parts, converters: Mapping[str, Any]) -> None:
    """Refuse what is not only laid one after the other on its way from the files."""
    if not parts:
        raise UserError(f"the files have no {name}, and no tensors that make it")
    for pattern in parts:
        operations = [] if pattern is None else converters[pattern].operations
        for operation in operations:
            kind = type(operation).__name__
            if (kind, getattr(operation, "dim", None)) not in _JOINING:
                raise UserError(
                    f"{name} cannot be offloaded: it is not in the files as in memory ({kind})"
                )


def _sources(
    name: str, parts: _Parts, experts: int, converters: Mapping[str, Any]
) -> list[list[str]]:
    """By expert the names that make it, or one list of the one tensor that has them all."""
    if None in parts or (len(parts) == 1 and len(next(iter(parts.values()))) == 1 < experts):
        found = [source for sources in parts.values() for source in sources]
        if len(found) > 1:
            raise UserError(f"expected {name} once in the files, got {', '.join(found[:3])}")
        return [found]
    patterns = converters[str(next(iter(parts)))].source_patterns
    columns = [parts.get(pattern, []) for pattern in patterns]
    for pattern, column in zip(patterns, columns, strict=True):
        if len(column) != experts:
            raise UserError(f"{name} needs {experts} of {pattern}, got {len(column)} in the files")
    return [list(own) for own in zip(*columns, strict=True)]


def _require_fitting(name: str, headers: list[list[TensorHeader]], parameter: Any) -> None:
    """Refuse tensors of another type or size than the parameter that they are to make."""
    wanted = _DTYPES.get(parameter.dtype)
    for header in (header for own in headers for header in own):
        if header.dtype != wanted:
            raise UserError(
                f"{name} lies in the files as {header.dtype}, and offloaded experts are read as "
                f"they are; expected the model in that type, got {parameter.dtype}"
            )
    shape = tuple(parameter.shape)
    if not all(own[0].shape == shape or _stacked(own) == shape[1:] for own in headers):
        got = [header.shape for header in headers[0]]
        raise UserError(f"{name} must be {shape}, got {got} in the files")


def _stacked(own: list[TensorHeader]) -> tuple[int, ...]:
    """The shape of an expert's tensors one below the other."""
    (_, *rest), rows = own[0].shape, sum(header.shape[0] for header in own)
    return (rows, *rest) if all(list(h.shape[1:]) == rest for h in own) else ()
