"""Our model: the time of a target forward from what it must read and multiply.

Differences from the paper's ten parameters: B * (gamma + 1) tokens are charged; dense products,
expert products, attention and the output head have their own rooflines with a smooth maximum;
expert unions may be correlated; the KV cache is read (long contexts); launches and per-token work
are explicit; remote or offloaded experts travel over a link. With parameters straight from a
``Machine`` it needs no measurement of the model at all; ``forward_fit`` adjusts them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from decoder.perf_model.hardware.machine import Machine, RowCurve

from . import theory
from .activation import ActiveExperts, CorrelatedActivation
from .model_spec import LayerSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class Adjustments:
    """Dimensionless corrections to the machine's prediction; 1 everywhere means none.

    Args:
        dense_memory, dense_compute: multiply the weight-reading and the arithmetic time of dense
            products and the head; expert_memory, expert_compute the same of experts.
        attention: multiplies KV reading and attention arithmetic.
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


@dataclass(frozen=True, slots=True)
class Link:
    """Experts that are not in local memory: a documented extension, not validated by measurement.

    Args:
        bandwidth: bytes/s over the link.
        remote_share: share of active experts that must come over it (offload: 1 - cache hit rate;
            the weights travel).
        token_share: share of routed rows that travel instead (expert parallelism with ``n`` ranks:
            1 - 1 / n; activations travel there and back, experts stay).
        latency: seconds per MoE layer (all-to-all start-up).
    """

    bandwidth: float
    remote_share: float = 0.0
    token_share: float = 0.0
    latency: float = 0.0


@dataclass(frozen=True, slots=True)
class RoundTimes:
    """Seconds of the parts of one speculative round and of one autoregressive step.

    Args:
        ar, verify: target forwards over 1 and gamma + 1 tokens per row.
        draft: ONE draft forward and its sampling.
        reject: acceptance and sampling of a round; ``sample`` the same of a plain step.
    """

    ar: float
    verify: float
    draft: float
    reject: float
    sample: float

    @property
    def ar_step(self) -> float:
        """Seconds of one autoregressive step, sampling included."""
        return self.ar + self.sample

    def round(self, gamma: int) -> float:
        """Seconds of a round of ``gamma`` drafts."""
        return gamma * self.draft + self.verify + self.reject


@dataclass(frozen=True)
class ForwardModel:
    """Predicts times for a target, an optional draft, and a machine.

    Args:
        dtype: of the matrix products, a key of ``Machine.flops``.
        sharpness: exponent of the smooth maximum of memory and compute time; large is a hard max.
        activation: distinct experts for (sequences, tokens per sequence).
    """

    target: ModelSpec
    machine: Machine
    draft: ModelSpec | None = None
    dtype: str = "bf16"
    adjust: Adjustments = field(default_factory=Adjustments)
    activation: ActiveExperts = field(default_factory=CorrelatedActivation)
    sharpness: float = 3.0
    link: Link | None = None

    def round_times(self, batch: int, gamma: int, context: int = 512) -> RoundTimes:
        """Times of a round of ``batch`` rows with ``gamma`` drafts at ``context`` cached tokens."""
        draft = 0.0
        if self.draft is not None and gamma > 0:
            base = self.forward_time(self.draft, batch, 1, context)
            base += self._logits_time(self.draft.vocab, batch, 6)
            draft = self.adjust.draft * base
            draft += (self.adjust.draft_token - 1.0) * self._token_time(self.draft, batch)
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
        tokens = sequences * per_sequence
        total = self._dense_time(spec.head * spec.dense_bytes, spec.head, tokens)
        total += 4 * self.adjust.launch * self.machine.launch
        for layer, count in spec.layer_groups:
            total += count * self._layer_time(spec, layer, sequences, per_sequence, context)
        return total + self.adjust.token * self._token_time(spec, tokens)

    def sample_time(self, batch: int, gamma: int) -> float:
        """Seconds to turn logits into tokens: two passes over fp32 logits and a few launches."""
        launches = 6 if gamma == 0 else 20
        return self.adjust.reject * self._logits_time(
            self.target.vocab, batch * (gamma + 1), launches
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
        time += self._attention_time(spec, layer, sequences, tokens, context)
        if layer.num_experts:
            time += self._expert_time(spec, layer, sequences, per_sequence)
        return time

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
        active = float(self.activation(sequences, per_sequence, layer.num_experts, layer.top_k))
        routed = sequences * per_sequence * layer.top_k
        per_param = self._per_param(
            machine.expert_curve,
            spec.expert_bytes,
            machine.expert_bandwidth or machine.bandwidth,
            machine.expert_flops or machine.peak(self.dtype),
            routed / active,
            (self.adjust.expert_memory, self.adjust.expert_compute),
        )
        time = active * layer.expert * per_param
        if self.link is not None:
            weights = self.link.remote_share * active * layer.expert * spec.expert_bytes
            rows = self.link.token_share * routed * spec.hidden * 2 * 2.0  # there and back, bf16
            time += (weights + rows) / self.link.bandwidth + self.link.latency
        return time

    def _attention_time(
        self, spec: ModelSpec, layer: LayerSpec, sequences: int, tokens: int, context: int
    ) -> float:
        """The cache of each sequence is read once for all its queries."""
        seen = min(context, layer.window or context)
        memory = sequences * seen * layer.kv_width * spec.kv_bytes / self.machine.bandwidth
        compute = 4.0 * tokens * seen * layer.query_width / self.machine.peak(self.dtype)
        return self.adjust.attention * _smooth_max(memory, compute, self.sharpness)

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
            return _smooth_max(floor, compute * 2.0 * rows / flops, self.sharpness)
        floor = curve.seconds[0]
        return memory * floor + compute * max(_interpolate(curve, rows) - floor, 0.0)

    def with_top_k(self, top_k: int | None) -> ForwardModel:
        """The same model with another K for the target."""
        if top_k is None or self.target.moe is None or top_k == self.target.moe.top_k:
            return self
        return replace(self, target=self.target.with_top_k(top_k))

    def at_memory_speed(self, speed: float | None) -> ForwardModel:
        """The same model while memory is ``speed`` times as fast; ``None`` is as described."""
        return self if speed is None else replace(self, machine=self.machine.at_memory_speed(speed))


def _smooth_max(a: float, b: float, sharpness: float) -> float:
    high, low = max(a, b), min(a, b)
    if high <= 0.0:
        return 0.0
    return high * (1.0 + (low / high) ** sharpness) ** (1.0 / sharpness)


def _interpolate(curve: RowCurve, rows: float) -> float:
    """Linear in rows inside the curve; beyond its end proportional to rows."""
    last = curve.rows[-1]
    if rows > last:
        return curve.seconds[-1] * rows / last
    return float(np.interp(max(rows, curve.rows[0]), curve.rows, curve.seconds))
