"""What the target makes of the training rows, computed once and kept on disk for every pass.

A part is one file of up to PART_ROWS rows, their places one after the other. Parts are mapped and
not read, so that what memory is free holds them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from training.checkpoint import load_checkpoint, save_checkpoint

from .accept import answered
from .data import Batch, grouped

PART_ROWS = 256
CHUNK = 4096  # places whose logits exist at once


@dataclass
class Lesson:
    """Rows padded on the right, and what the head is to say after each of their places."""

    ids: torch.Tensor  # int64 [B, L]
    counted: torch.Tensor  # bool [B, L], places that are learned from
    features: torch.Tensor  # bf16 [B, L, n * H], the hidden states that the head fuses
    mean: torch.Tensor  # bf16 [B, L, H], see ``wanted``
    choice: torch.Tensor  # int64 [B, L], arg-max of the distribution over the draft vocabulary


@torch.no_grad()
def wanted(last: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The target's distribution over the draft vocabulary, as far as a loss needs it.

    Args:
        last: ``[N, H]``, hidden states that the output rows read.
        rows: ``[draft vocabulary, H]``, the target's output rows.

    Returns:
        ``[N, H]``, the mean of ``rows`` under the distribution, and its arg-max, int64 ``[N]``.
    """
    mean = torch.empty_like(last)
    choice = torch.empty(len(last), dtype=torch.int64, device=last.device)
    for start in range(0, len(last), CHUNK):
        part = slice(start, start + CHUNK)
        scores = last[part] @ rows.T
        choice[part] = scores.argmax(-1)
        mean[part] = scores.softmax(-1) @ rows
    return mean, choice


class Lessons:
    """Annotated rows in a folder, in the order in which they came.

    Args:
        folder: of the parts; made if need be.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.parts = [_mapped(path) for path in sorted(folder.glob("part-*.pt"))]

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return sum(len(part["ids"]) for part in self.parts)

    @property
    def vocabulary(self) -> torch.Tensor | None:
        """int64 ``[draft vocabulary]``, the target's ids of it; ``None`` before it is set."""
        path = self.folder / "vocabulary.pt"
        return load_checkpoint(path) if path.exists() else None

    @vocabulary.setter
    def vocabulary(self, ids: torch.Tensor) -> None:
        save_checkpoint(ids, self.folder / "vocabulary.pt")

    def without(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """Those of ``rows`` that are not among the lessons."""
        known = {
            row.numpy().tobytes()
            for part in self.parts
            for row in part["ids"].split(part["lengths"].tolist())
        }
        return [row for row in rows if row.int().numpy().tobytes() not in known]

    def append(self, batches: list[Batch], output_rows: torch.Tensor) -> None:
        """Write one more part.

        Args:
            batches: annotated rows.
            output_rows: ``[draft vocabulary, H]``, the target's.
        """
        columns: dict[str, list[torch.Tensor]] = {}
        for batch in batches:
            mean, choice = wanted(batch.last[batch.real], output_rows)
            for name, column in {
                "lengths": batch.real.sum(1),
                "ids": batch.ids[batch.real].int(),
                "counted": answered(batch)[batch.real],
                "features": batch.features[batch.real],
                "mean": mean,
                "choice": choice.int(),
            }.items():
                columns.setdefault(name, []).append(column.cpu())
        path = self.folder / f"part-{len(self.parts):04}.pt"
        save_checkpoint({name: torch.cat(column) for name, column in columns.items()}, path)
        self.parts.append(_mapped(path))

    def epoch(self, tokens: int, seed: int, device: str) -> Iterator[Lesson]:
        """Every row once, in batches of like length, shuffled.

        Args:
            tokens: a batch has at most so many, with its padding.
            seed: of the order.
            device: where to.
        """
        random = torch.Generator().manual_seed(seed)
        places = [
            (length, number, end - length)
            for number, part in enumerate(self.parts)
            for length, end in zip(
                part["lengths"].tolist(), part["lengths"].cumsum(0).tolist(), strict=True
            )
        ]
        order = torch.randperm(len(places), generator=random).tolist()
        groups = grouped([places[i] for i in order], tokens, lambda place: place[0])
        for i in torch.randperm(len(groups), generator=random).tolist():
            yield self._lesson(groups[i], device)

    def _lesson(self, places: list[tuple[int, int, int]], device: str) -> Lesson:
        def padded(name: str) -> torch.Tensor:
            rows = [self.parts[number][name][at : at + n] for n, number, at in places]
            return pad_sequence(rows, batch_first=True).to(device)

        ids, choice = padded("ids").long(), padded("choice").long()
        return Lesson(ids, padded("counted"), padded("features"), padded("mean"), choice)


def _mapped(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True, mmap=True)
