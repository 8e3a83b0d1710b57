"""transformers' logits processors: as sampling parameters, or applied to each row's own prefixes.

Under speculation a processor meets the positions of a row more than once and those of drafts that
are thrown away, so it must depend on the prefix alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from decoder.errors import UserError
from decoder.requests.params import SamplingParams

# What the sampler does itself, in transformers' order, which is the sampler's as well.
_REPETITION = "RepetitionPenaltyLogitsProcessor"
_SAMPLERS_OWN = (
    _REPETITION,
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
)

# Classes of transformers whose scores are a function of one row's ids and scores.
PREFIX_FUNCTIONS = frozenset(_SAMPLERS_OWN) | {
    "EncoderNoRepeatNGramLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "ExponentialDecayLengthPenalty",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor",
    "TopHLogitsWarper",
    "TypicalLogitsWarper",
    "WatermarkLogitsProcessor",
}

# The arguments that make `generate` use a class that keeps state between its calls.
_STATEFUL = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "SynthIDTextWatermarkLogitsProcessor": "watermarking_config",
}


def check(processors: Sequence[Any]) -> None:
    """Refuse what may keep state.

    Raises:
        UserError: a processor that is no known function of the prefix and does not say that it is.
    """
    for processor in processors:
        name = getattr(processor, "__name__", type(processor).__name__)
        if _standard(processor) in PREFIX_FUNCTIONS:
            continue
        if getattr(processor, "is_prefix_function", False) is True:
            continue
        argument = _STATEFUL.get(_standard(processor), "logits_processor")
        raise UserError(
            f"{argument} is not supported with speculative generation where it may keep state: "
            f"expected {name} to have is_prefix_function = True, which says that the scores it "
            "returns for a row depend on that row's input_ids and scores alone"
        )


def sampling_params(
    processors: Sequence[Any],
    sampling: bool,
    width: int,
    padding: Sequence[int],
    end_ids: frozenset[int],
    common: dict[str, Any],
) -> SamplingParams | None:
    """Parameters under which the sampler itself does what ``processors`` do.

    Args:
        processors: in their order.
        sampling: rather than greedy.
        width: of the padded prompts.
        padding: tokens on the left of each row.
        end_ids: that end a row.
        common: fields that do not come from processors.

    Returns:
        ``None`` where the sampler cannot.
    """
    fields: dict[str, Any] = {"temperature": 1.0} if sampling else {}
    previous = -1
    for processor in processors:
        name = _standard(processor)
        rank = _SAMPLERS_OWN.index(name) if name in _SAMPLERS_OWN else -1
        if rank <= previous or not (sampling or rank < 3):
            return None
        previous = rank
        if name == _REPETITION:
            ignored = processor.prompt_ignore_length
            if not isinstance(ignored, Tensor):
                ignored = torch.tensor(ignored or 0).expand(len(padding))
            if ignored.tolist() != list(padding):  # the sampler knows no padding
                return None
            fields["repetition_penalty"] = processor.penalty
        elif rank < 3:
            if frozenset(processor.eos_token_id.tolist()) != end_ids:
                return None
            least = (
                processor.min_length - width
                if name.startswith("MinLength")
                else processor.min_new_tokens
            )
            skipped = getattr(processor, "prompt_length_to_skip", width)
            if skipped != width:
                return None
            fields["min_new_tokens"] = max(least, fields.get("min_new_tokens", 0))
        else:
            kept = getattr(processor, "min_tokens_to_keep", 1)
            if kept != 1 or getattr(processor, "filter_value", -float("inf")) != -float("inf"):
                return None
            parameter = ("temperature", "top_k", "top_p", "min_p")[rank - 3]
            fields[parameter] = getattr(processor, parameter)
    try:
        return SamplingParams(**common, **fields)
    except ValueError:  # a value that transformers takes and the sampler does not
        return None


class RowProcessors:
    """All processors for one row, as a request's ``process``.

    Args:
        processors: checked ones.
        prompt: ``[L]`` the row's ids as given, padding included: what processors look at.
        row: its place in the batch.
        rows: of the batch.
    """

    def __init__(self, processors: Sequence[Any], prompt: Tensor, row: int, rows: int) -> None:
        self._processors = [_of_row(processor, row, rows) for processor in processors]
        self._prompt = prompt

    def __call__(self, output_ids: Sequence[int], logits: Tensor) -> Tensor:
        """See ``decoder.sampling.processors``."""
        # Processors keep tensors that they make, and are used outside inference mode later.
        with torch.inference_mode(False), torch.no_grad():
            own = torch.tensor(output_ids, dtype=self._prompt.dtype, device=self._prompt.device)
            input_ids = torch.cat([self._prompt, own])[None]  # [1, n]
            scores = logits.to(self._prompt.device, copy=True)[None]  # [1, V]
            for processor in self._processors:
                scores = processor(input_ids, scores)
            return scores[0]


def _standard(processor: Any) -> str:
    """The name of a class of transformers, ``""`` for others, subclasses included."""
    kind = type(processor)
    own = kind.__module__ == "transformers.generation.logits_process"
    return kind.__name__ if own else ""


def _of_row(processor: Any, row: int, rows: int) -> Any:
    """``processor`` for a batch of ``row`` alone, where it holds something for each row."""
    name = _standard(processor)
    own = copy.copy(processor)
    if name == _REPETITION:
        if isinstance(processor.prompt_ignore_length, Tensor):
            own.prompt_ignore_length = processor.prompt_ignore_length[row : row + 1]
    elif name == "EncoderRepetitionPenaltyLogitsProcessor":
        ids = processor.encoder_input_ids
        at = row * len(ids) // rows  # prompts are repeated by num_return_sequences, these are not
        own.encoder_input_ids = ids[at : at + 1]
    elif name == "EncoderNoRepeatNGramLogitsProcessor":
        at = row * processor.batch_size // rows
        own.batch_size, own.generated_ngrams = 1, [processor.generated_ngrams[at]]
    elif name == "PrefixConstrainedLogitsProcessor":
        allowed = processor._prefix_allowed_tokens_fn
        own._prefix_allowed_tokens_fn = lambda _, ids: allowed(row, ids)
    else:
        return processor
    return own
