"""Rows for the EAGLE-3 head: shares, order, batches and the target's view of them."""

from __future__ import annotations

import pytest
import torch

from training.upcycle.eagle.data import ROW, SHARES, cut, draft_vocabulary, grouped, mixed


def texts(**counts: int) -> dict[str, list[list[int]]]:
    """Per domain so many texts of 20, 21, ... tokens; each token says whose it is."""
    return {
        domain: [[100 * number + i] * (20 + i) for i in range(count)]
        for number, (domain, count) in enumerate(counts.items())
    }


def test_the_draft_vocabulary_is_the_most_frequent_by_shares() -> None:
    chat, code = [7, 7, 7, 3], [5] * 900 + [3] * 100
    found = draft_vocabulary({"chat": [chat], "code": [code]}, 10, 3)
    assert found.tolist() == [3, 5, 7]
    assert draft_vocabulary({"chat": [chat], "code": [code]}, 10, 1).tolist() == [7]


def test_long_texts_are_cut_and_scraps_left_out() -> None:
    rows = cut([[1] * (2 * ROW + 3), [1] * 5, [1] * 40])
    assert [len(row) for row in rows] == [ROW, ROW, 40]


def test_every_row_comes_once_and_domains_by_shares_while_they_last() -> None:
    source = texts(chat=40, code=40, docs=40)
    rows = mixed(source, seed=3)
    assert len({int(row[0]) for row in rows}) == len(rows) == 120
    tokens = dict.fromkeys(source, 0)
    chats = 0
    for row in rows:
        domain = list(source)[int(row[0]) // 100]
        tokens[domain] += len(row)
        chats += domain == "chat"
        if chats == 40:
            break
    for domain, share in SHARES.items():
        assert tokens[domain] / sum(tokens.values()) == pytest.approx(share, abs=0.05)
    again = zip(rows, mixed(source, seed=3), strict=True)
    assert all(torch.equal(a, b) for a, b in again)


def test_batches_are_of_like_length_and_bounded() -> None:
    rows = [torch.zeros(n, dtype=torch.int64) for n in (30, 10, 29, 11, 10, 30)]
    groups = grouped(rows, 60)
    assert [[len(row) for row in group] for group in groups] == [[30, 30], [29, 11], [10, 10]]
