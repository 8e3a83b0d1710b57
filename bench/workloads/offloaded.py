"""Models whose experts stay in their files, read with less memory than they would fill."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from bench.workloads.models import named_config, random_model
from decoder.checkpoint.folder import model_folder
from decoder.checkpoint.weights import weight_files
from decoder.model.loading import load_model
from decoder.offload import Offload


def offloaded_model(
    target: str, dtype: torch.dtype, share: float, top_k: int | None = None
) -> PreTrainedModel:
    """A target with experts in files.

    Args:
        target: a random one by name, which is written below the folder for temporary files, or a
            path.
        dtype: of a random model, and of the files of another.
        share: of the bytes of the model's weights that its experts may take in memory.
        top_k: experts per token of a random model.

    Raises:
        ValueError: ``top_k`` for a model from files.
    """
    config = named_config(target, top_k)
    if config is None:
        if top_k:
            raise ValueError(f"offloaded, {target} is run as it is, got experts per token {top_k}")
        return _load(model_folder(target), dtype, share)
    with TemporaryDirectory(prefix="moesd-offload-") as folder:
        random_model(config, dtype).save_pretrained(folder)
        for file in weight_files(Path(folder)):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())  # the page cache keeps what has not been written
        model = _load(Path(folder), dtype, share)  # the files stay open when their names are gone
    model.name_or_path = model.config.name_or_path = target
    return model


def _load(folder: Path, dtype: torch.dtype, share: float) -> PreTrainedModel:
    files = weight_files(folder)
    offload = Offload(int(share * sum(file.stat().st_size for file in files)))
    model: PreTrainedModel = load_model(folder, dtype=dtype, device="cpu", offload=offload)
    return model
