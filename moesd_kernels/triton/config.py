from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    name: str = "H200"
    capability: int = 90
    sms: int = 132
    shared_bytes: int = 232448


@dataclass(frozen=True, slots=True)
class LayerShape:
    E: int
    K: int
    H: int
    I: int
    T: int
    gated: bool = True


@dataclass(frozen=True, slots=True)
class GemmConfig:
    block_m: int = 16
    block_n: int = 32
    block_k: int = 32
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3
    swap_ab: bool = False
    group_m: int = 1

    def constexprs(self):
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "SWAP_AB": self.swap_ab,
            "GROUP_M": self.group_m,
        }

    def options(self):
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True, slots=True)
class MoEConfig:
    gate_up: GemmConfig
    down: GemmConfig
    single: GemmConfig

    @property
    def block_m(self):
        return self.gate_up.block_m


def select_config(shape, dtype, device, *, batch_invariant=False):
    g = GemmConfig()
    return MoEConfig(g, GemmConfig(split_k=2), g)
