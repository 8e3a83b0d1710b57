"""Batched speculative decoding behind transformers' own ``generate``.

``model.generate(**inputs, custom_generate=speculative(draft_model), max_new_tokens=64)`` returns
what ``generate`` returns for the same arguments, for any batch size, which ``assistant_model=``
refuses above one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from decoder.drafters import DraftOptions, build_drafter
from decoder.engine.loop import SpeculativeDecoder
from decoder.requests.params import SamplingParams

from .errors import UserError

_UNSUPPORTED = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "return_dict_in_generate": False,
}


def speculative(
    drafter: Any = "ngram", gamma: Any = "auto", **options: Any
) -> Callable[..., Tensor]:
    """A function for ``generate(custom_generate=...)``.

    Args:
        drafter: as for ``build_drafter``: a name, a draft model, a ``Drafter``.
        gamma, options: as in ``SpeculativeDecoder``. The decoder is built at the first call and
            kept for later ones with the same model and batch size.
    """
    decoders: dict[tuple[int, int], SpeculativeDecoder] = {}

    def generate(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Tensor:
        mask = model_kwargs.get("attention_mask")
        prompts = _prompts(input_ids, mask)
        key = id(model), len(prompts)
        if key not in decoders:
            told = DraftOptions(kernels=options.get("kernels", True))
            made = build_drafter(drafter, model, options=told)
            decoders[key] = SpeculativeDecoder(
                model, made, gamma, **{"max_batch_size": len(prompts)} | options
            )
        longest = input_ids.shape[1]
        params = _params(generation_config, longest)
        # Each row draws its own noise, as rows of a batch do in transformers.
        per_row = [
            params.updated({"seed": (params.seed or 0) + row}) for row in range(len(prompts))
        ]
        outputs = decoders[key].generate(prompts, per_row)
        return _assembled(input_ids, [o.token_ids for o in outputs], generation_config)

    return generate


def _params(config: Any, prompt_length: int) -> SamplingParams:
    """The generation config as sampling parameters.

    Raises:
        UserError: it asks for something speculation does not do exactly.
    """
    for name, neutral in _UNSUPPORTED.items():
        value = getattr(config, name, None)
        if value is not None and value != neutral:
            raise UserError(f"{name}={value!r} is not supported with speculative generation")
    sampling = bool(config.do_sample)
    limit = config.max_new_tokens
    if limit is None:
        limit = (config.max_length or 20) - prompt_length
    least = config.min_new_tokens
    if least is None:
        least = max(0, (config.min_length or 0) - prompt_length)
    chosen = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k,
              "min_p": config.min_p} if sampling else {}  # fmt: skip
    if sampling and chosen["temperature"] is None:
        chosen["temperature"] = 1.0
    return SamplingParams(
        **{name: value for name, value in chosen.items() if value is not None},
        repetition_penalty=config.repetition_penalty or 1.0,
        min_new_tokens=least,
        max_new_tokens=limit,
        seed=int(torch.randint(2**62, (1,))) if sampling else 0,
        stop_token_ids=tuple(_ids(config.eos_token_id)),
        ignore_eos=True,
    )


def _prompts(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Rows without their padding, whichever side it is on."""
    if mask is None:
        return input_ids.tolist()
    pairs = zip(input_ids.tolist(), mask.tolist(), strict=True)
    return [[token for token, keep in zip(row, kept, strict=True) if keep] for row, kept in pairs]


def _assembled(input_ids: Tensor, outputs: list[list[int]], config: Any) -> Tensor:
    """Prompts as given followed by outputs, padded on the right as ``generate`` does."""
    pad = _ids(config.pad_token_id) or _ids(config.eos_token_id) or [0]
    width = max(map(len, outputs))
    rows = [row + pad[:1] * (width - len(row)) for row in outputs]
    new = torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)
    return torch.cat([input_ids, new], dim=1)


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [int(i) for i in value.reshape(-1).tolist()]
    return [value] if isinstance(value, int) else list(value)
