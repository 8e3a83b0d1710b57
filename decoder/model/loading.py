"""Models and tokenizers from paths, with errors that fit on one line.

Nothing in a folder is run and no answer is read from standard input: code that comes with a model
is refused, and so are weights in any format but safetensors and GGUF (``docs/security.md``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from decoder.checkpoint.config import read_config, require_described
from decoder.checkpoint.folder import (
    CONFIG,
    GENERATION_CONFIG,
    is_gguf,
    model_folder,
    read_json,
    require_content,
    running_no_code,
)
from decoder.checkpoint.gguf_tokenizer import gguf_tokenizer
from decoder.checkpoint.report import require_every_weight, without_heads, without_other_parts
from decoder.checkpoint.tokenizer_files import require_tokenizer_files
from decoder.checkpoint.weights import require_whole_experts, tensor_headers, weight_files
from decoder.errors import UserError, explained
from decoder.model.kernels import gguf_file, keeping_quantized, load_gguf
from decoder.offload import ExpertsApart, Offload

DTYPES: dict[str, Any] = {
    "auto": "auto",
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    experts: str | None = None,
    packed: bool = False,
    offload: Offload | None = None,
    divide: Callable[[Any], Any] | None = None,
) -> Any:
    """A causal LM in evaluation mode, every weight of which comes from its files.

    Args:
        path: directory, a name on the model hub, or a GGUF file, whose matrices stay in its blocks.
        dtype: a torch dtype or a name in ``DTYPES``; ``"auto"`` is the checkpoint's own, bf16 of a
            GGUF file.
        device: CUDA when there is one, by default.
        experts: transformers' ``experts_implementation``, or its default.
        packed: leave FP8 and MXFP4 as they are stored where we can read them, as our own integers
            and a GGUF file's blocks always are.
        offload: how to run with experts that do not fit; by default they are loaded.
        divide: transformers' ``DistributedConfig`` of a configuration: this process is one of
            several, and loads its part, which stays where that puts it.

    Raises:
        UserError: nothing loadable there, weights that do not fit the configuration, a device that
            cannot be used, or an unknown dtype.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    device = _usable_device(device)
    wanted = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if offload is not None:
        _require_offloadable(path, device, offload)
    if is_gguf(path):
        if divide is not None:
            raise UserError(f"a GGUF file cannot be divided among ranks, got {str(path)!r}")
        with explained(f"cannot load model {str(path)!r}"):
            require_content(Path(path))
            return load_gguf(Path(path), torch.bfloat16 if wanted == "auto" else wanted).to(device)
    folder = model_folder(path)
    with explained(f"cannot load model {str(path)!r}"), keeping_quantized(others=packed):
        model = _load_safetensors(folder, wanted, device, experts, offload, divide)
        eos_ids(model)
        return (model if divide is not None else model.to(device)).eval()


def _load_safetensors(
    folder: Path,
    dtype: str | torch.dtype,
    device: torch.device,
    experts: str | None,
    offload: Offload | None,
    divide: Callable[[Any], Any] | None,
) -> Any:
    """The model of a folder whose files have been compared with each other, in host memory.

    Offloaded experts are computed on ``device``.
    """
    from transformers import AutoModelForCausalLM

    files = weight_files(folder)
    headers = tensor_headers(files)
    config = read_config(folder, len(headers))
    if (folder / GENERATION_CONFIG).exists():
        read_json(folder / GENERATION_CONFIG)  # a broken one would be passed over
    require_described(config, headers, folder / CONFIG)
    require_whole_experts(headers)
    options: dict[str, Any] = {} if experts is None else {"experts_implementation": experts}
    if divide is not None:
        options["distributed_config"] = divide(config)
    apart = None
    if offload is not None:
        copied = files if offload.folder is None else weight_files(Path(offload.folder))
        apart = ExpertsApart(config, copied, offload, device)
    loader: Any = AutoModelForCausalLM if apart is None else apart.model_class
    own = config if apart is None else apart.config
    with quiet():  # what it would report is raised here
        loaded: Any = loader.from_pretrained(
            folder,
            config=own,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    model, found = loaded
    if apart is not None:
        apart.attach(model, found)
    if config.sub_configs.keys() - {"text_config"}:
        found = without_other_parts(found, model)
    require_every_weight(folder, without_heads(found, model, headers))
    return model


def base_of_weights(
    kind: Any, config: Any, weights: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype
) -> Any:
    """A base model in evaluation mode, every weight of which is given, under a checkpoint's name.

    Args:
        kind: transformers' class of it.
        config: of that model.
        weights: name to tensor; experts may come one by one.
        folder: where they are from, for messages.
        dtype: of the model.

    Raises:
        UserError: weights that are missing, left over or of another shape.
    """
    with quiet():
        model, found = kind.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    require_every_weight(folder, found)
    return model.eval()


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer next to a model.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    from transformers import AutoTokenizer

    if is_gguf(path):
        with explained(f"cannot load tokenizer {str(path)!r}"):
            require_content(Path(path))
            return gguf_tokenizer(gguf_file(Path(path)))
    folder = model_folder(path, "tokenizer")
    with explained(f"cannot load tokenizer {str(path)!r}"), running_no_code(folder):
        require_tokenizer_files(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not tokenizer.vocab_size:
            raise UserError(f"the tokenizer in {folder} has no tokens")
        return tokenizer


def load_with_tokenizer(path: str | Path, **options: Any) -> tuple[Any, Any]:
    """``load_model`` and the tokenizer beside it, which must be the model's."""
    model, tokenizer = load_model(path, **options), load_tokenizer(path)
    require_fitting_tokenizer(tokenizer, model)
    return model, tokenizer


def require_fitting_tokenizer(tokenizer: Any, model: Any) -> None:
    """Refuse a tokenizer of another model: one with more tokens than the model has rows.

    Tokens that were added later do not count: fine-tuned models come with some past the table, and
    a prompt that has one is refused by itself.

    Raises:
        UserError: both numbers.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer must be the model's: it has {tokenizer.vocab_size} tokens, the model "
            f"{rows}"
        )


def eos_ids(model: Any) -> frozenset[int]:
    """End-of-sequence ids: of the generation config, else of the model config.

    Raises:
        UserError: neither an integer nor a list of them.
    """
    for config in (getattr(model, "generation_config", None), model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is None:
            continue
        listed = ids if isinstance(ids, list | tuple) else [ids]
        if not all(isinstance(one, int) and not isinstance(one, bool) for one in listed):
            raise UserError(f"eos_token_id must be an integer or a list of them, got {ids!r}")
        return frozenset(listed)
    return frozenset()


def context_length(model: Any) -> int:
    """The model's context, in positions."""
    config = model.config.get_text_config(decoder=True)
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else 2**15


def default_device() -> torch.device:
    """CUDA when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _usable_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return default_device()
    with explained(f"device {str(device)!r} cannot be used"):
        usable = torch.device(device)
        if usable.type == "meta":
            raise UserError("device must be one that computes, got 'meta'")
        torch.empty(1, device=usable)
    return usable


def _require_offloadable(path: str | Path, device: torch.device, offload: Offload) -> None:
    if offload.host is (device.type == "cpu"):
        there = "in host memory for a GPU" if offload.host else "in files for a CPU"
        raise UserError(f"these experts would wait {there}, got device {str(device)!r}")
    if is_gguf(path):
        raise UserError(f"experts of safetensors files can be offloaded, got {str(path)!r}")


@contextmanager
def quiet() -> Iterator[None]:
    """What transformers would warn of inside is said by the caller, or is none of its business."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
