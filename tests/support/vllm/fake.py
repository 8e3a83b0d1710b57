"""As much of vLLM 0.32 as its plugin touches: the same names and modules, hardly any content."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_SCHED = "vllm.v1.core.sched"


class FusedMoEExperts:
    """The parts of vLLM's base class that ours lean on."""

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        self.moe_config, self.quant_config = moe_config, quant_config

    @property
    def w1_bias(self) -> Any:
        return self.quant_config.w1_bias

    @property
    def w2_bias(self) -> Any:
        return self.quant_config.w2_bias

    def process_weights_after_loading(self, layer: Any) -> None:
        raise AssertionError("vLLM's repacking was not kept from the weights")


class CPUUnquantizedExperts(FusedMoEExperts):
    pass


class X86CPUUnquantizedExperts(CPUUnquantizedExperts):
    pass


class TritonExperts(FusedMoEExperts):
    pass


class FlashInferExperts(FusedMoEExperts):
    pass


class Scheduler:
    """One that is handed finished schedules: what a test says was scheduled."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.dynamic_sd_lookup: Any = None
        self.unfinished = True

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> str:
        return "vLLM's outputs"

    def has_unfinished_requests(self) -> bool:
        return self.unfinished


class AsyncScheduler(Scheduler):
    pass


def fake_vllm(monkeypatch: pytest.MonkeyPatch, version: str = "0.32.0") -> SimpleNamespace:
    """Put the fake where ``import vllm`` finds it, and forget it and what saw it afterwards.

    Returns:
        ``chosen``: the class that vLLM's choice of experts answers; ``config``: the current one.
    """
    state = SimpleNamespace(chosen=CPUUnquantizedExperts, config=None)
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": version},
        "vllm.config": {"get_current_vllm_config_or_none": lambda: state.config},
        f"{_FUSED_MOE}.unquantized_fused_moe_method": {
            "select_unquantized_moe_backend": lambda moe_config: ("backend", state.chosen)
        },
        f"{_FUSED_MOE}.experts.cpu_moe": {"CPUUnquantizedExperts": CPUUnquantizedExperts},
        f"{_FUSED_MOE}.experts.triton_moe": {"TritonExperts": TritonExperts},
        f"{_FUSED_MOE}.topk_weight_and_reduce": {"TopKWeightAndReduceNoOP": lambda: "no-op"},
        f"{_SCHED}.scheduler": {"Scheduler": Scheduler},
        f"{_SCHED}.async_scheduler": {"AsyncScheduler": AsyncScheduler},
    }
    for name in [*sys.modules]:
        if name.partition(".")[0] == "vllm":
            monkeypatch.delitem(sys.modules, name)
    for path, names in contents.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
                if end > 1:
                    setattr(
                        sys.modules[".".join(parts[: end - 1])], parts[end - 1], sys.modules[name]
                    )
        vars(sys.modules[path]).update(names)
    for ours in ("moesd_vllm.experts", "moesd_vllm.scheduler"):
        # Set before it is deleted: what a test imports is then forgotten, too.
        monkeypatch.setitem(sys.modules, ours, ModuleType(ours))
        del sys.modules[ours]
    state.method = sys.modules[f"{_FUSED_MOE}.unquantized_fused_moe_method"]
    return state
