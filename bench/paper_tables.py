"""The paper's Tables 1 and 2: sigma and peak speedup of every row (arXiv 2505.19645)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Cell(NamedTuple):
    """One (gamma) cell: sigma, and the peak speedup over batch sizes."""

    sigma: float
    speedup: float


@dataclass(frozen=True, slots=True)
class Row:
    """One row: what was run, and its cells for gamma = 2, 3, 4."""

    hardware: str
    target: str
    draft: str
    data: str
    temperature: int
    cells: tuple[Cell, Cell, Cell]

    @property
    def name(self) -> str:
        """Short name for tables and file names."""
        return f"{self.target} {self.hardware} {self.data} T={self.temperature}"


GAMMAS = (2, 3, 4)
QWEN, MIXTRAL = ("qwen2-57b-a14b", "qwen2-0.5b"), ("mixtral-8x7b", "eagle")
HUMANEVAL, MTBENCH = "humaneval", "mt-bench"

_CELLS = [
    ("2xA800", QWEN, HUMANEVAL, 0, (0.94, 1.63, 0.93, 1.96, 0.91, 2.18)),
    ("2xA800", QWEN, HUMANEVAL, 1, (0.83, 1.48, 0.73, 1.50, 0.67, 1.72)),
    ("2xA800", QWEN, MTBENCH, 0, (0.71, 1.25, 0.62, 1.29, 0.55, 1.19)),
    ("2xA800", QWEN, MTBENCH, 1, (0.68, 1.22, 0.57, 1.29, 0.48, 1.20)),
    ("2xA800", MIXTRAL, HUMANEVAL, 0, (0.78, 1.67, 0.66, 1.69, 0.58, 1.79)),
    ("2xA800", MIXTRAL, HUMANEVAL, 1, (0.61, 1.38, 0.46, 1.33, 0.39, 1.32)),
    ("2xA800", MIXTRAL, MTBENCH, 0, (0.61, 1.34, 0.46, 1.32, 0.39, 1.26)),
    ("2xA800", MIXTRAL, MTBENCH, 1, (0.53, 1.21, 0.43, 1.20, 0.35, 1.18)),
    ("2xH800", QWEN, HUMANEVAL, 0, (0.95, 1.71, 0.93, 2.01, 0.90, 2.29)),
    ("2xH800", QWEN, HUMANEVAL, 1, (0.82, 1.36, 0.74, 1.47, 0.75, 1.84)),
    ("2xH800", QWEN, MTBENCH, 0, (0.71, 1.46, 0.62, 1.45, 0.54, 1.43)),
    ("2xH800", QWEN, MTBENCH, 1, (0.67, 1.27, 0.56, 1.22, 0.48, 1.18)),
    ("4xA800", QWEN, HUMANEVAL, 0, (0.95, 1.65, 0.93, 1.90, 0.90, 2.08)),
    ("4xA800", QWEN, HUMANEVAL, 1, (0.81, 1.38, 0.73, 1.45, 0.67, 1.46)),
    ("4xA800", QWEN, MTBENCH, 0, (0.72, 1.26, 0.61, 1.24, 0.52, 1.15)),
    ("4xA800", QWEN, MTBENCH, 1, (0.67, 1.14, 0.58, 1.20, 0.47, 1.05)),
    ("4xL40", QWEN, HUMANEVAL, 0, (0.95, 1.79, 0.93, 2.14, 0.90, 2.25)),
    ("4xL40", QWEN, HUMANEVAL, 1, (0.80, 1.46, 0.74, 1.62, 0.65, 1.64)),
    ("4xL40", QWEN, MTBENCH, 0, (0.71, 1.29, 0.62, 1.26, 0.54, 1.25)),
    ("4xL40", QWEN, MTBENCH, 1, (0.68, 1.28, 0.54, 1.23, 0.48, 1.17)),
]

ROWS = tuple(
    Row(
        hardware,
        *pair,
        data,
        temperature,
        (Cell(*numbers[0:2]), Cell(*numbers[2:4]), Cell(*numbers[4:6])),
    )
    for hardware, pair, data, temperature, numbers in _CELLS
)
# The dense comparison of Fig. 6 has no table: only its sigma-free shape over B is reproduced.
DENSE = ("opt-30b", "opt-350m")


def rows_of(target: str, hardware: str) -> list[Row]:
    """The rows of one target on one machine.

    Raises:
        ValueError: the paper has none.
    """
    rows = [row for row in ROWS if row.target == target and row.hardware == hardware]
    if not rows:
        known = sorted({(row.target, row.hardware) for row in ROWS})
        raise ValueError(f"the paper has no {target} on {hardware}; it has {known}")
    return rows
