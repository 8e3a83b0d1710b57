"""Values configurations are made from and of."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Device:
    """What the choice of tiles depends on; the defaults are an H200.

    Attributes:
        name: the driver's name of the device; a tuned file is found by it.
        capability: 10 * major + minor.
        sms: streaming multiprocessors.
        shared_bytes: shared memory a program may use.
        bandwidth: DRAM bytes per second that a copy reaches.
        matrix_flops: dense bf16 operations per second.
    """

    name: str = "NVIDIA H200"
    capability: int = 90
    sms: int = 132
    shared_bytes: int = 232448
    bandwidth: float = 4.3e12
    matrix_flops: float = 7.9e14


# One device of each architecture the kernels are compiled for without having it.
A100 = Device("NVIDIA A100-SXM4-80GB", 80, 108, 166912, 1.8e12, 2.8e14)
H100 = Device("NVIDIA H100 80GB HBM3", bandwidth=3.0e12)
H200 = Device()
B200 = Device("NVIDIA B200", 100, 148, 232448, 7.0e12, 2.0e15)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A layer's dimensions and the tokens entering it.

    ``weight_bits`` are those of a stored weight of gate_up and of down, without scales; None for
    the activations'.
    """

    E: int
    K: int
    H: int
    I: int
    T: int
    gated: bool = True
    weight_bits: tuple[int | None, int | None] = (None, None)

    @property
    def layer(self) -> tuple[int, int, int, int, bool]:
        """The dimensions without T."""
        return self.E, self.K, self.H, self.I, self.gated


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Tiles of one product.

    Attributes:
        block_m: rows (tokens) of a tile; the same for both products of a layer.
        block_n: weight rows of a tile; of each of gate and up.
        block_k: columns of one step.
        split_k: programs that share a tile's columns; 1 for gate_up.
        num_warps: warps of a program.
        num_stages: steps whose loads are under way.
        swap_ab: whether weights are the matrix instruction's M operand.
        group_m: blocks whose equal tiles are adjacent in launch order.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3
    swap_ab: bool = False
    group_m: int = 1

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        for name in ("split_k", "num_stages", "group_m"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def constexprs(self) -> dict[str, int | bool]:
        """Arguments both product kernels are specialised on."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "SWAP_AB": self.swap_ab,
        }

    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True, slots=True)
class LayerTiles:
    """Tiles of a layer: both products, and their one-token forms (block_m has no meaning there).

    Attributes:
        gate_up: the first product.
        down: the second product.
        single_gate_up: one token's gate_up without matrix instructions; None multiplies with them.
        single_down: one token's down projection and combine.
        inline_pairs: routed pairs up to which gate_up's programs find their rows by themselves.
    """

    gate_up: TileConfig
    down: TileConfig
    single_gate_up: TileConfig | None
    single_down: TileConfig
    inline_pairs: int = 512

    def __post_init__(self) -> None:
        if self.gate_up.block_m != self.down.block_m:
            raise ValueError(
                "gate_up and down share one plan: block_m must be equal, got "
                f"{self.gate_up.block_m} and {self.down.block_m}"
            )
        if self.gate_up.split_k != 1:
            raise ValueError(f"gate_up.split_k must be 1, got {self.gate_up.split_k}")

    @property
    def block_m(self) -> int:
        """Rows of a block of the plan."""
        return self.gate_up.block_m

    def with_block_m(self, block_m: int) -> LayerTiles:
        """The same tiles on blocks of another height."""
        gate_up, down = (replace(tile, block_m=block_m) for tile in (self.gate_up, self.down))
        return replace(self, gate_up=gate_up, down=down)

    def with_group_m(self, group_m: int) -> LayerTiles:
        """The same tiles in another order of programs."""
        gate_up, down = (replace(tile, group_m=group_m) for tile in (self.gate_up, self.down))
        return replace(self, gate_up=gate_up, down=down)
