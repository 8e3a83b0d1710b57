"""Which transformers models can run over a ragged cache, and their attention settings."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig

from decoder.errors import UserError
from decoder.offload import store_of

from . import kernels
from .recurrent.functions import adapt
from .recurrent.states import RecurrentStates

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_attn_implementation_internal"
_thread = threading.local()
# By name: their packages need not be installed. The last is the class of a weight of torchao's.
_ROW_DEPENDENT = {"Linear8bitLt", "Float8Linear", "LinearActivationQuantizedTensor"}
_WITHOUT_STATE = {"full_attention", "sliding_attention", "mlp", "moe"}
_WITH_STATE = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}


def broken_weights(model: Any) -> list[str]:
    """Names of the parameters that hold NaN or infinities; every weight is read for it.

    Of quantised weights the scales alone are looked at, of a model whose experts are offloaded none
    are: not all of its weights are in memory.
    """
    if store_of(model) is not None:
        return []
    wide = [(n, p) for n, p in model.named_parameters() if p.is_floating_point() and p.numel()]
    ends = [(n, p.detach().aminmax()) for n, p in wide if p.dtype.itemsize > 1]
    return [n for n, (low, high) in ends if not bool(low.isfinite() & high.isfinite())]


def check_loaded(model: Any) -> None:
    """Refuse a path where a model is expected.

    Raises:
        UserError: ``model`` is no transformers model; says what loads one.
    """
    if not hasattr(model, "get_input_embeddings"):
        raise UserError(
            f"target must be a loaded causal LM, got {type(model).__name__} {str(model)[:80]!r}; "
            "SpeculativeDecoder.from_paths loads one"
        )


def recurrent_states(model: Any, num_rows: int, undecided: int) -> RecurrentStates | None:
    """Room for what layers of a model keep instead of keys and values, if there are any.

    Args:
        num_rows: cache rows.
        undecided: most tokens of a row that may yet be taken back.

    Raises:
        UserError: what ``check_supported`` says, or there are no operators for them.
    """
    if not check_supported(model):
        return None
    device = model.get_input_embeddings().weight.device
    return RecurrentStates(num_rows, undecided, kernels.recurrent_operators(), device)


def check_supported(model: Any) -> bool:
    """Refuse models whose past can be rolled back neither by masking nor by replaying.

    Returns:
        Whether it has layers with a recurrent state.

    Raises:
        UserError: chunked, encoder-decoder or unknown recurrent architectures.
    """
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder-decoder model; expected a decoder-only causal LM")
    layers = set(getattr(config, "layer_types", None) or ())
    exotic = layers - _WITHOUT_STATE - _WITH_STATE
    stateful = layers & _WITH_STATE or (not layers and getattr(model, "_is_stateful", False))
    if exotic or (stateful and not adapt(model)):
        refused = exotic or layers & _WITH_STATE
        kinds = ", ".join(sorted(refused)) or "recurrent state"
        raise UserError(
            f"{name} has {kinds} layers{_first_of(model, config, refused)}, whose state cannot be "
            "rolled back when drafted tokens are rejected; supported are attention that masking "
            "rolls back, and delta rules, Mamba and short convolutions behind transformers' cache"
        )
    if getattr(model.get_output_embeddings(), "weight", None) is None:
        raise UserError(f"{name} has no language-model head of one matrix; expected a causal LM")
    check_runs_whole(model)
    return bool(stateful)


def _first_of(model: torch.nn.Module, config: Any, kinds: set[str]) -> str:
    """What mixes tokens in the first layer of some kinds: its first part that has parts itself."""
    types = getattr(config, "layer_types", None) or ()
    index = next((i for i, kind in enumerate(types) if kind in kinds), 0)
    text = set(model.get_decoder().modules())  # type: ignore[operator]
    for name, layers in model.named_modules():
        if isinstance(layers, torch.nn.ModuleList) and layers in text and len(layers) > index:
            for part, mixer in layers[index].named_children():
                if next(mixer.children(), None) is not None:
                    return f" ({type(mixer).__name__} in {name}.{index}.{part})"
    return ""


def hidden_dtype(model: torch.nn.Module) -> torch.dtype:
    """The dtype a model computes in: of its embedding, or where that is packed, of its norms."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    tensors = [embedding.weight, *(p for p in model.parameters() if p.ndim == 1)]
    numbers = [t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1]
    return numbers[0] if numbers else torch.float32


def check_same(
    model: Any,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    attention: Iterable[int],
) -> None:
    """Refuse a model that has become another one since a decoder was built on it.

    Args:
        model: as it is now.
        vocab_size, dtype, device: as they were.
        attention: ``id`` of each attention module that there was.

    Raises:
        UserError: what has changed.
    """
    check_runs_whole(model)
    if model.training:
        warn_of_row_dependence(model)
    weight, expected = model.get_output_embeddings().weight, (vocab_size, dtype, device)
    found = weight.shape[0], hidden_dtype(model), model.get_input_embeddings().weight.device
    if found != expected:
        now, then = (f"{tokens} tokens in {kind} on {on}" for tokens, kind, on in (found, expected))
        raise UserError(
            f"{type(model).__name__} has changed under its decoder: expected {then}, got {now}; "
            "build a new decoder"
        )
    if not {id(module) for module in model.modules()}.issuperset(attention):
        raise UserError(
            f"{type(model).__name__} has got other attention layers than its decoder was built "
            "for; build a new decoder"
        )


def check_runs_whole(model: torch.nn.Module) -> None:
    """Refuse a model that would not run, or not as the decoder reads it.

    Raises:
        UserError: the first module that is compiled, or in training without a cache or at random,
            or that the weights are in more than one place.
    """
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise UserError(
            f"{type(model).__name__} is on {', '.join(sorted(map(str, devices)))}; expected all of "
            "its weights in the memory of one device"
        )
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None:
            raise UserError(
                f"{name or type(model).__name__} is compiled; expected a model as it was loaded, "
                "whose forwards the decoder runs in its own way"
            )
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise UserError(
                f"{name or type(model).__name__} is in training with gradient checkpointing, which "
                "keeps no cache; call eval() on the model first"
            )
        if module.training and isinstance(module, _DropoutNd) and module.p > 0:
            raise UserError(
                f"{name} ({type(module).__name__}) is in training and drops at random; call eval() "
                "on the model first"
            )


def warn_of_row_dependence(model: torch.nn.Module) -> None:
    """Name, in one warning, modules known to compute a token from the whole batch.

    Such are bitsandbytes' 8-bit layers, whose outliers are the batch's, activations quantised with
    one scale for all, routers with a capacity, and batch norms in training.
    """
    found = [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if type(module).__name__ in _ROW_DEPENDENT
        or "quantized.dynamic" in type(module).__module__
        or type(module._parameters.get("weight")).__name__ in _ROW_DEPENDENT
        or isinstance(vars(module).get("expert_capacity"), int)
        or (module.training and isinstance(module, _BatchNorm))
    ]
    if found:
        logger.warning(
            "outputs may depend on what is decoded beside them: %s%s",
            *(found[0], f" and {len(found) - 1} more modules" if len(found) > 1 else ""),
        )


def warn_of_library_products(model: torch.nn.Module, all_ours: bool) -> None:
    """Say where rows depend on the batch though they were not to.

    Args:
        model: a model with an embedding.
        all_ours: whether every linear layer of its forward runs on our kernels.
    """
    device = next(model.parameters()).device
    if not all_ours and kernels.on_gpu(device) and kernels.is_batch_invariant(model):
        logger.warning(
            "batch_invariant: not the linear layers of %s that run as modules, on cuBLAS",
            type(model).__name__,
        )


def attention_configs(model: torch.nn.Module) -> list[Any]:
    """Every distinct config object that a module of ``model`` reads its attention choice from."""
    found = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [c for c in found.values() if hasattr(c, _ATTRIBUTE)]


class _ByThread:
    """What configs keep under ``_ATTRIBUTE``; for a thread inside ``attention_named``, its name.

    Models read the attention they run from a config that all threads share. Another name written
    there for the time of a forward would switch the forwards of other threads with it.
    """

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        if config is None:
            return self
        if not torch.compiler.is_compiling():  # which could not read a thread's variables
            name = getattr(_thread, "names", {}).get(id(config))
            if name is not None:
                return name
        try:
            return config.__dict__[_ATTRIBUTE]
        except KeyError:
            raise AttributeError(_ATTRIBUTE) from None

    def __set__(self, config: Any, value: Any) -> None:
        config.__dict__[_ATTRIBUTE] = value


@contextmanager
def attention_named(name: str, configs: list[Any]) -> Iterator[None]:
    """Let this thread's forwards of the models of these configs run the attention of that name.

    The configs are not touched.
    """
    if not isinstance(vars(PreTrainedConfig).get(_ATTRIBUTE), _ByThread):
        setattr(PreTrainedConfig, _ATTRIBUTE, _ByThread())
    previous: dict[int, str] = getattr(_thread, "names", {})
    _thread.names = previous | {id(config): name for config in configs}
    try:
        yield
    finally:
        _thread.names = previous
