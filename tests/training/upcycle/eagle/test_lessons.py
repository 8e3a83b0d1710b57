"""Annotated rows on disk: all that was put in comes out, once per epoch, and only what is new."""

from __future__ import annotations

from pathlib import Path

import torch

from training.upcycle.eagle.data import Batch
from training.upcycle.eagle.lessons import Lessons, wanted

H, V = 4, 11


def batch(*lengths: int) -> Batch:
    """Rows of so many tokens with features and last states at random."""
    shape = len(lengths), max(lengths)
    real = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, 900, shape) * real
    return Batch(ids, real, *(torch.randn(*shape, n * H).bfloat16() for n in (3, 1)))


def test_an_epoch_gives_every_row_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    output = torch.randn(V, H).bfloat16()
    batches = [batch(9, 7, 7), batch(5, 3)]
    for each in batches:
        Lessons(tmp_path).append([each], output)
    kept = Lessons(tmp_path)
    assert kept.tokens == 31
    expected = {
        tuple(b.ids[i, :n].tolist()): (b.features[i, :n], *wanted(b.last[i, :n], output))
        for b in batches
        for i, n in enumerate(b.real.sum(1).tolist())
    }
    lessons = list(kept.epoch(18, seed=1, device="cpu"))
    assert all(lesson.ids.numel() <= 18 for lesson in lessons)
    for lesson in lessons:
        for i, n in enumerate(lesson.counted.sum(1).tolist()):
            features, mean, choice = expected.pop(tuple(lesson.ids[i, :n].tolist()))
            assert torch.equal(lesson.features[i, :n], features)
            torch.testing.assert_close(lesson.mean[i, :n], mean)
            assert torch.equal(lesson.choice[i, :n], choice)
    assert not expected


def test_rows_that_it_has_are_not_annotated_again(tmp_path: Path) -> None:
    kept = Lessons(tmp_path)
    assert kept.vocabulary is None
    kept.vocabulary = torch.arange(V)
    known = batch(6, 4)
    kept.append([known], torch.randn(V, H).bfloat16())
    rows = [known.ids[1, :4], torch.arange(4), known.ids[0, :6]]
    left = Lessons(tmp_path).without(rows)
    assert [row.tolist() for row in left] == [[0, 1, 2, 3]]
    assert torch.equal(Lessons(tmp_path).vocabulary, torch.arange(V))
