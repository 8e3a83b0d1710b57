"""Our model: the time of a target forward from what it must read and multiply.

Differences from the paper's ten parameters: B * (gamma + 1) tokens are charged; dense products,
expert products, attention and the output head have their own rooflines with a smooth maximum;
expert unions may be correlated; the KV cache is read (long contexts); launches and per-token work
are explicit; experts that do not fit are brought as steps need them (``offload/``), and experts
may be spread over ranks. With
parameters straight from a ``Machine`` it needs no measurement of the model at all; ``forward_fit``
adjusts them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from decoder.perf_model.hardware.machine import Machine, RowCurve, smooth_max

from . import theory
from .activation import ActiveExperts, CorrelatedActivation, tokens_alike
from .model_spec import LayerSpec, ModelSpec
from .parallel.ranks import Ranks
from .times import RankTimes, RoundTimes

if TYPE_CHECKING:  # it follows the store's own rules, which come with PyTorch
    from .offload.reads import ExpertReads

_STATE_FLOPS = 7  # per state element and token: decay, an outer product added, two dot products


@dataclass(frozen=True, slots=True)
class Adjustments:
    """Dimensionless corrections to the machine's prediction; 1 everywhere means none.

    Args:
        dense_memory, dense_compute: multiply the weight-reading and the arithmetic time of dense
            products and the head; expert_memory, expert_compute the same of experts.
        attention: multiplies KV reading, recurrent states' traffic and the arithmetic of both.
        launch: multiplies the cost of operator calls.
        token: multiplies the per-token work outside matrix products.
        draft, reject: multiply a draft forward and the acceptance step; draft_token the per-token
            work of a draft forward.
    """

    dense_memory: float = 1.0
    dense_compute: float = 1.0
    expert_memory: float = 1.0
    expert_compute: float = 1.0
    attention: float = 1.0
    launch: float = 1.0
    token: float = 1.0
    draft: float = 1.0
    draft_token: float = 1.0
    reject: float = 1.0


@functools.lru_cache(maxsize=4096)  # a fit asks for the same cells at every step
def _distinct(
    activation: ActiveExperts, sequences: int, per_sequence: int, experts: int, top_k: int
) -> float:
    return float(activation(sequences, per_sequence, experts, top_k))


@dataclass(frozen=True)
class ForwardModel:
    """Predicts times for a target, an optional draft, and a machine.

    Args:
        dtype: of the matrix products, a key of ``Machine.flops``.
        sharpness: exponent of the smooth maximum of memory and compute time; large is a hard max.
        activation: distinct experts for (sequences, tokens per sequence).
        ranks: over which the target's experts are spread, each rank a ``machine``, with a draft of
            its own; batches are of all ranks.
        offload: how the target's experts are brought where they do not fit; the draft's do.
    """

    target: ModelSpec
    machine: Machine
    draft: ModelSpec | None = None
    dtype: str = "bf16"
    adjust: Adjustments = field(default_factory=Adjustments)
    activation: ActiveExperts = field(default_factory=CorrelatedActivation)
    sharpness: float = 3.0
    ranks: Ranks | None = None
    offload: ExpertReads | None = None

    def __post_init__(self) -> None:
        if self.ranks is not None and self.offload is not None:
            raise ValueError("experts are offloaded by one process, got ranks as well")

    def round_times(self, batch: int, gamma: int, context: int = 512) -> RoundTimes:
        """Times of a round of ``batch`` rows with ``gamma`` drafts at ``context`` cached tokens."""
        draft = 0.0
        if self.draft is not None and gamma > 0:
            local, alone = self._local(batch), replace(self, ranks=None, offload=None)
            base = alone.forward_time(self.draft, local, 1, context)
            base += self._logits_time(self.draft.vocab, local, 6)
            draft = self.adjust.draft * base
            draft += (self.adjust.draft_token - 1.0) * self._token_time(self.draft, local)
        return RoundTimes(
            ar=self.forward_time(self.target, batch, 1, context),
            verify=self.forward_time(self.target, batch, gamma + 1, context),
            draft=draft,
            reject=self.sample_time(batch, gamma),
            sample=self.sample_time(batch, 0),
        )

    def speedup(self, batch: int, gamma: int, sigma: float, context: int = 512) -> float:
        """Eq. 4 with these times."""
        if gamma == 0:
            return 1.0
        times = self.round_times(batch, gamma, context)
        return sigma * (gamma + 1) * times.ar_step / times.round(gamma)

    def target_efficiency(self, batch: int, gamma: int, context: int = 512) -> float:
        """``T_T(B, 1) / T_T(B, gamma)`` in the engine's convention (gamma + 1 tokens verified)."""
        times = self.round_times(batch, gamma, context)
        return float(theory.target_efficiency(times.ar, times.verify))

    def round_cost(self, batch: int, gamma: int, context: int = 512) -> float:
        """Seconds of a round, gamma 0 included: what the γ controller divides by."""
        times = self.round_times(batch, gamma, context)
        return times.round(gamma) if gamma else times.ar_step

    def forward_time(
        self, spec: ModelSpec, sequences: int, per_sequence: int, context: int = 512
    ) -> float:
        """Seconds of one forward of ``spec`` over ``sequences * per_sequence`` tokens."""
        local = self._local(sequences)
        tokens = local * per_sequence
        total = self._dense_time(spec.head * spec.dense_bytes, spec.head, tokens)
        total += 4 * self.adjust.launch * self.machine.launch
        for layer, count in spec.layer_groups:
            one = self._layer_time(spec, layer, local, per_sequence, context)
            if layer.num_experts:
                one += self._expert_time(spec, layer, sequences, per_sequence)
                if self.offload is not None:
                    active, _ = self.expert_load(layer, sequences, per_sequence)
                    one = self.offload.layer_seconds(one, active, layer.num_experts)
            total += count * one
        return total + self.adjust.token * self._token_time(spec, tokens)

    def rank_times(self, batch: int, gamma: int, context: int = 512) -> RankTimes:
        """A verify forward of ``gamma + 1`` tokens a row; zeros in collectives without ranks."""
        collective = sum(
            count * self._collective_time(self.target, layer, batch, gamma + 1)
            for layer, count in self.target.layer_groups
            if layer.num_experts
        )
        return RankTimes(self.forward_time(self.target, batch, gamma + 1, context), collective)

    def read_bytes(self, batch: int, gamma: int) -> float:
        """Bytes of experts that a forward over ``gamma + 1`` tokens a row brings; 0 if all fit."""
        if self.offload is None:
            return 0.0
        return sum(
            count
            * self.offload.layer_bytes(self.expert_load(x, batch, gamma + 1)[0], x.num_experts)
            for x, count in self.target.layer_groups
            if x.num_experts
        )

    def sample_time(self, batch: int, gamma: int) -> float:
        """Seconds to turn logits into tokens: two passes over fp32 logits and a few launches."""
        launches = 6 if gamma == 0 else 20
        return self.adjust.reject * self._logits_time(
            self.target.vocab, self._local(batch) * (gamma + 1), launches
        )

    def _logits_time(self, vocab: int, rows: int, launches: int) -> float:
        return 2 * 4.0 * vocab * rows / self.machine.bandwidth + launches * self.machine.launch

    def _layer_time(
        self, spec: ModelSpec, layer: LayerSpec, sequences: int, per_sequence: int, context: int
    ) -> float:
        tokens = sequences * per_sequence
        params = layer.attention + layer.dense
        time = self._dense_time(params * spec.dense_bytes, params, tokens)
        time += self.adjust.launch * (layer.launches * self.machine.launch) + self.machine.sync
        time += self._recurrent_time(spec, layer, sequences, per_sequence)
        return time + self._attention_time(spec, layer, sequences, tokens, context)

    def _dense_time(self, size: float, params: float, tokens: float) -> float:
        return params * self._per_param(
            self.machine.dense_curve,
            size / params,
            self.machine.bandwidth,
            self.machine.peak(self.dtype),
            tokens,
            (self.adjust.dense_memory, self.adjust.dense_compute),
        )

    def _expert_time(
        self, spec: ModelSpec, layer: LayerSpec, sequences: int, per_sequence: int
    ) -> float:
        """Active experts, each read once and multiplied with its mean number of rows."""
        machine = self.machine
        active, routed = self.expert_load(layer, sequences, per_sequence)
        per_param = self._per_param(
            machine.expert_curve,
            spec.expert_bytes,
            machine.expert_bandwidth or machine.bandwidth,
            machine.expert_flops or machine.peak(self.dtype),
            routed / active,
            (self.adjust.expert_memory, self.adjust.expert_compute),
        )
        collective = self._collective_time(spec, layer, sequences, per_sequence)
        return active * layer.expert * per_param + collective

    def expert_load(
        self, layer: LayerSpec, sequences: int, per_sequence: int
    ) -> tuple[float, float]:
        """Distinct experts of a layer and rows routed to them; of the rank that has most."""
        experts, top_k = layer.num_experts, layer.top_k
        active = _distinct(self.activation, sequences, per_sequence, experts, top_k)
        routed = float(sequences * per_sequence * top_k)
        if self.ranks is None:
            return active, routed
        alike = tokens_alike(self.activation, per_sequence, experts, top_k)
        return self.ranks.busiest(active, routed, alike, experts)

    def _collective_time(
        self, spec: ModelSpec, layer: LayerSpec, sequences: int, per_sequence: int
    ) -> float:
        if self.ranks is None:
            return 0.0
        _, rows = self.expert_load(layer, sequences, per_sequence)
        size = 4.0 if self.dtype == "fp32" else 2.0
        return self.ranks.collective_seconds(sequences * per_sequence, rows, spec.hidden, size)

    def _local(self, sequences: int) -> int:
        """Sequences whose attention one rank computes."""
        return sequences if self.ranks is None else self.ranks.local(sequences)

    def _attention_time(
        self, spec: ModelSpec, layer: LayerSpec, sequences: int, tokens: int, context: int
    ) -> float:
        """The cache of each sequence is read once for all its queries."""
        seen = min(context, layer.window or context)
        memory = sequences * seen * layer.kv_width * spec.kv_bytes / self.machine.bandwidth
        compute = 4.0 * tokens * seen * layer.query_width / self.machine.peak(self.dtype)
        return self.adjust.attention * smooth_max(memory, compute, self.sharpness)

    def _recurrent_time(
        self, spec: ModelSpec, layer: LayerSpec, sequences: int, per_sequence: int
    ) -> float:
        """A row's state is read, moved on by the last step's accepted tokens, and written.

        Then it passes the step's own tokens without being written; of these, the ring keeps what
        the next step replays. As many are taken to be replayed as are verified, at the most; their
        arithmetic is charged at the rate of fp32 matrix products, which vector units do not reach.
        """
        if not layer.ring_width:
            return 0.0
        kept = layer.conv_width + per_sequence * layer.ring_width
        size = layer.state_width * spec.state_bytes + kept * spec.kv_bytes
        memory = 2 * sequences * size / self.machine.bandwidth
        products = _STATE_FLOPS * 2 * per_sequence * sequences * layer.state_width
        compute = products / self.machine.peak("fp32")
        return self.adjust.attention * smooth_max(memory, compute, self.sharpness)

    def _token_time(self, spec: ModelSpec, tokens: float) -> float:
        """Norms, rotary, residuals: about 40 passes over a token's hidden state per layer."""
        return tokens * len(spec.layers) * 40 * spec.hidden * 2 / self.machine.bandwidth

    def _per_param(
        self,
        curve: RowCurve | None,
        bytes_per_param: float,
        bandwidth: float,
        flops: float,
        rows: float,
        multipliers: tuple[float, float],
    ) -> float:
        """Seconds per weight parameter at ``rows`` rows.

        A measured curve is split into its one-row floor (memory) and what rises above it (compute),
        so that both multipliers keep their meaning.
        """
        memory, compute = multipliers
        if curve is None:
            floor = memory * bytes_per_param / bandwidth
            return smooth_max(floor, compute * 2.0 * rows / flops, self.sharpness)
        floor = curve.seconds[0]
        return memory * floor + compute * max(curve.at(rows) - floor, 0.0)

    def with_top_k(self, top_k: int | None) -> ForwardModel:
        """The same model with another K for the target."""
        if top_k is None or self.target.moe is None or top_k == self.target.moe.top_k:
            return self
        return replace(self, target=self.target.with_top_k(top_k))

    def at_memory_speed(self, speed: float | None) -> ForwardModel:
        """The same model while memory is ``speed`` times as fast; ``None`` is as described."""
        return self if speed is None else replace(self, machine=self.machine.at_memory_speed(speed))
