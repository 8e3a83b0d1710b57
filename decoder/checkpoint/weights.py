"""The weight files of a model's folder, and what their headers say.

Only safetensors: a pickle can run code when it is read. The format's own library checks a header
(sizes, offsets, types), so what it lets pass is a table of names, shapes and types.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from decoder.errors import UserError, explained

from .folder import foreign_format, inside, read_json, require_content

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_JOINED = {"up_proj.weight": "gate_proj.weight", "w3.weight": "w1.weight"}
_JOINED |= {gate: up for up, gate in _JOINED.items()}
_EXPERT = re.compile(r"(.*\bexperts\.)(\d+)\.(.+)")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_CONVERT = (
    "convert them where you trust their origin, with AutoModelForCausalLM.from_pretrained(old)"
    ".save_pretrained(new) or, for single tensors, safetensors.torch.save_file(torch.load(file, "
    "weights_only=True), 'model.safetensors')"
)


class TensorHeader(NamedTuple):
    """What a file says of a tensor.

    Attributes:
        shape: its dimensions.
        dtype: safetensors' name of its type, such as ``"BF16"``.
        numel: how many elements that makes.
    """

    shape: tuple[int, ...]
    dtype: str
    numel: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the one there is, or those that its index names.

    Raises:
        UserError: there are none, one that the index names is missing or outside the folder; other
            formats are named.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        return _shards(folder)
    with explained(f"cannot read {folder}"):
        entries = sorted(folder.iterdir())
    pickles = [entry.name for entry in entries if entry.suffix in _PICKLES]
    if pickles:
        raise UserError(
            f"{folder} has its weights in pickle files ({few(pickles)}), which can run code and "
            f"are not read; expected {WEIGHTS}: {_CONVERT}"
        )
    found = foreign_format(entries)
    if found:
        raise UserError(f"{folder}: {found}")
    raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}")


def tensor_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """Name to shape and type of every tensor; the weights themselves are not read.

    Raises:
        UserError: a file that is cut off, garbled or a pointer of git-lfs; a name that occurs
            twice.
    """
    from safetensors import safe_open

    headers: dict[str, TensorHeader] = {}
    for file in files:
        with explained(f"cannot read {file} as safetensors"):
            require_content(file)
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    if name in headers:
                        raise UserError(f"{file}: tensor {name} is also in another file")
                    tensor = opened.get_slice(name)
                    shape = tuple(tensor.get_shape())
                    headers[name] = TensorHeader(shape, str(tensor.get_dtype()), math.prod(shape))
    return headers


def read_tensors(files: Iterable[Path], names: Collection[str]) -> dict[str, Any]:
    """The tensors of these names; of the files nothing else is read but their headers.

    Raises:
        UserError: a file that cannot be read, or a name that none has.
    """
    from safetensors import safe_open

    wanted = set(names)
    found: dict[str, Any] = {}
    for file in files:
        with explained(f"cannot read {file} as safetensors"), safe_open(file, "pt") as opened:
            here = wanted.intersection(opened.keys())
            found |= {name: opened.get_tensor(name) for name in sorted(here)}
    if missing := wanted - found.keys():
        raise UserError(f"no file has {few(missing)}")
    return found


def require_whole_experts(headers: Mapping[str, TensorHeader]) -> None:
    """Refuse experts of one layer that do not have the same tensors: they are stacked into one.

    Raises:
        UserError: which tensor is missing, or differs in shape or type.
    """
    layers: dict[str, dict[str, dict[int, TensorHeader]]] = {}
    for name, header in headers.items():
        if match := _EXPERT.fullmatch(name):
            parts = layers.setdefault(match[1], {})
            parts.setdefault(match[3], {})[int(match[2])] = header
    for layer, parts in layers.items():
        for part, experts in parts.items():
            beside = parts.get(_JOINED.get(part, part), experts)
            last = max(*experts, *beside)
            count = 1 + min(last, len(headers))  # a name may say any number
            missing = [f"{layer}{index}.{part}" for index in range(count) if index not in experts]
            if missing:
                raise UserError(f"missing: {few(missing)}")
            if odd := [index for index in experts if experts[index] != experts[0]]:
                raise UserError(
                    f"{layer}{odd[0]}.{part} must be {_text(experts[0])} as of expert 0, got "
                    f"{_text(experts[odd[0]])}"
                )


def _text(header: TensorHeader) -> str:
    return f"{header.shape} {header.dtype}"


def few(names: Collection[str], most: int = 3) -> str:
    """The first few names in order, and how many there are."""
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown}, ... {len(names)} in all"


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} must have a weight_map from tensor names to file names")
    files = []
    for name in sorted({str(name) for name in weight_map.values()}):
        file = folder / name
        if not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name!r}, expected safetensors files")
        with explained(f"{index} names {name!r}"):
            if not inside(folder, file):
                raise UserError(f"{index} names {name!r}, which lies outside its folder")
            if not file.is_file():
                raise UserError(f"{index} names {name!r}, which is missing")
        files.append(file)
    return files
