"""Steps until a stage's budget is spent, with a log, a bar and checkpoints."""

import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from training.optim import Budget

CHECKPOINT_SECONDS = 180


def spend(
    budget: Budget, log: Path, step: Callable[[], dict[str, float]], save: Callable[[], None]
) -> None:
    """Train; a checkpoint every few minutes and at the end.

    Args:
        budget: how long.
        log: appended a line to at each step: tokens and seconds so far, and what ``step`` returns.
        step: one update; returns its numbers by name.
        save: writes a checkpoint.
    """
    saved = time.monotonic()
    with (
        log.open("a") as file,
        tqdm(total=100.0, bar_format="{l_bar}{bar}| {elapsed} {postfix}", mininterval=5) as bar,
    ):
        while budget.progress < 1.0:
            numbers = {name: f"{value:.4f}" for name, value in step().items()}
            line = [f"{budget.tokens_done}", f"{budget.seconds:.0f}", *numbers.values()]
            file.write(" ".join(line) + "\n")
            file.flush()
            bar.n = 100 * budget.progress
            bar.set_postfix_str(" ".join(f"{name} {value}" for name, value in numbers.items()))
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save()
                saved = time.monotonic()
    save()
