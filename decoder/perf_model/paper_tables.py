"""Tables 1 and 2 of the MoESD paper: the peak speedup of each configuration over batch sizes.

The batch size of each peak is not given in the paper, nor are the units of its times; speedup is
their ratio.
"""

from __future__ import annotations

from typing import NamedTuple


class PaperCell(NamedTuple):
    """One cell; ``machine`` is a name ``machine.named_machine`` knows."""

    target: str
    machine: str
    dataset: str
    temperature: float
    gamma: int
    ar_time: float
    speculative_time: float
    sigma: float
    speedup: float


# target, machine, dataset, temperature, then T_AR/T_SD/sigma/speedup at gamma 2, 3, 4
_ROWS = """
qwen2-57b-a14b 2xa800 humaneval 0 18.89/11.61/.94/1.63 15.93/8.11/.93/1.96 15.93/7.31/.91/2.18
qwen2-57b-a14b 2xa800 humaneval 1 19.13/12.93/.83/1.48 21.20/14.09/.73/1.50 19.13/11.14/.67/1.72
qwen2-57b-a14b 2xa800 mt_bench 0 20.92/16.70/.71/1.25 16.00/12.43/.62/1.29 20.92/17.53/.55/1.19
qwen2-57b-a14b 2xa800 mt_bench 1 21.15/17.33/.68/1.22 19.09/14.83/.57/1.29 19.09/15.93/.48/1.20
mixtral-8x7b 2xa800 humaneval 0 20.86/12.47/.78/1.67 21.00/12.46/.66/1.69 20.86/11.69/.58/1.79
mixtral-8x7b 2xa800 humaneval 1 21.52/15.58/.61/1.38 21.39/16.03/.46/1.33 21.48/16.23/.39/1.32
mixtral-8x7b 2xa800 mt_bench 0 21.61/16.10/.61/1.34 21.61/16.43/.46/1.32 21.36/16.89/.39/1.26
mixtral-8x7b 2xa800 mt_bench 1 21.33/17.70/.53/1.21 21.33/17.84/.43/1.20 21.33/18.05/.35/1.18
qwen2-57b-a14b 2xh800 humaneval 0 15.96/9.34/.95/1.71 15.96/7.95/.93/2.01 15.96/6.96/.90/2.29
qwen2-57b-a14b 2xh800 humaneval 1 17.39/12.82/.82/1.36 13.20/8.98/.74/1.47 13.20/7.17/.75/1.84
qwen2-57b-a14b 2xh800 mt_bench 0 24.42/16.74/.71/1.46 24.42/16.84/.62/1.45 24.42/17.05/.54/1.43
qwen2-57b-a14b 2xh800 mt_bench 1 18.24/14.38/.67/1.27 16.25/13.28/.56/1.22 16.25/13.76/.48/1.18
qwen2-57b-a14b 4xa800 humaneval 0 11.20/6.77/.95/1.65 11.20/5.89/.93/1.90 11.20/5.38/.90/2.08
qwen2-57b-a14b 4xa800 humaneval 1 11.72/8.51/.81/1.38 12.05/8.30/.73/1.45 11.23/7.70/.67/1.46
qwen2-57b-a14b 4xa800 mt_bench 0 11.26/8.92/.72/1.26 11.26/9.10/.61/1.24 11.26/9.82/.52/1.15
qwen2-57b-a14b 4xa800 mt_bench 1 11.78/10.32/.67/1.14 11.30/9.42/.58/1.20 11.78/11.25/.47/1.05
qwen2-57b-a14b 4xl40 humaneval 0 17.84/10.00/.95/1.79 17.84/8.33/.93/2.14 17.84/7.94/.90/2.25
qwen2-57b-a14b 4xl40 humaneval 1 17.89/12.27/.80/1.46 17.89/11.07/.74/1.62 17.89/10.91/.65/1.64
qwen2-57b-a14b 4xl40 mt_bench 0 20.40/15.87/.71/1.29 20.40/16.22/.62/1.26 20.40/16.33/.54/1.25
qwen2-57b-a14b 4xl40 mt_bench 1 20.58/16.02/.68/1.28 18.11/14.75/.54/1.23 18.11/15.54/.48/1.17
"""


def paper_cells() -> list[PaperCell]:
    """The 60 cells in the paper's order."""
    cells = []
    for row in _ROWS.strip().splitlines():
        target, machine, dataset, temperature, *columns = row.split()
        for gamma, column in zip((2, 3, 4), columns, strict=True):
            values = [float(value) for value in column.split("/")]
            cells.append(PaperCell(target, machine, dataset, float(temperature), gamma, *values))
    return cells
