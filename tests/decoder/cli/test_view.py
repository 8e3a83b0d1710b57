"""Colours follow the drafted flags, over characters and not over bytes; tables show dashes."""

import io

from decoder.cli.view import (
    DRAFTED,
    TARGET,
    Console,
    colored,
    comparison_table,
    number,
    print_text,
    stats_line,
)  # fmt: skip
from decoder.engine.metrics import DecoderStats
from decoder.requests.outputs import Output, SequenceStats


class Bytes:
    """One token per UTF-8 byte, so that characters span tokens; ends inside them as real ones."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", errors="replace")


def test_spans_follow_origin():
    ids = list("abé!".encode())
    flags = [False, True, True, False, True]
    text = colored(Output(0, None, None, ids, "abé!", "length", SequenceStats(1), flags), Bytes())
    assert text.plain == "abé!"
    spans = [(text.plain[s.start : s.end], s.style) for s in text.spans if s.end > s.start]
    assert spans == [("a", TARGET), ("b", DRAFTED), ("é", TARGET), ("!", DRAFTED)]


def test_text_cut_at_a_stop_string_stays_cut():
    ids = list(b"hello")
    flags = [True] * 5
    output = Output(0, None, None, ids, "he", "stop", SequenceStats(1), flags)
    assert colored(output, Bytes()).plain == "he"


def test_a_character_whose_bytes_are_of_both_kinds_is_shown_whole():
    for word in ("日日", "a日b", "x😀y"):
        ids = list(word.encode())
        for flags in ([i % 2 == 0 for i in range(len(ids))], [i < 2 for i in range(len(ids))]):
            output = Output(0, None, None, ids, word, "length", SequenceStats(1), flags)
            assert colored(output, Bytes()).plain == word


def test_text_that_no_prefix_has_is_shown_all_the_same():
    output = Output(0, None, None, [97], "A and more", "length", SequenceStats(1), [True])
    assert colored(output, Bytes()).plain == "A and more"


def test_what_is_no_terminal_gets_the_text_as_it_is():
    file = io.StringIO()
    output = Output(
        0, None, None, [9, 9], "\t\t\x0b\r\n\x1b[1m" + "x" * 200, "length", SequenceStats(1)
    )
    print_text(Console(file=file, width=80), "all:\n\t", output, Bytes())
    assert file.getvalue() == f"all:\n\t{output.text}\n"


def test_table_and_line_without_speculation():
    stats = DecoderStats()
    times = dict.fromkeys(("draft", "verify", "sample", "host"), 0.001)
    stats.observe(0, [0, 0], [0, 0], times)
    table = comparison_table(
        stats, stats, title="t", plain_rate=1.0, speculative_rate=2.0, ratio=2.0, identical=(1, 2)
    )
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    shown = console.export_text()
    assert "2.00x" in shown
    assert "NO (1/2)" in shown
    assert "alpha" not in stats_line(stats)
    assert number(None) == "-"


def test_metrics_on_a_hand_made_run():
    stats = DecoderStats()
    times = {"draft": 0.001, "verify": 0.004, "sample": 0.0, "host": 0.0}
    stats.observe(2, [2, 2], [2, 0], times)
    stats.observe(2, [2, 1], [1, 1], times)
    stats.observe(0, [0, 0], [0, 0], times | {"verify": 0.002})
    # Decided drafts: 2, 1, 2, 1; accepted 2, 0, 1, 1.
    assert stats.alpha == 4 / 6
    assert stats.alpha_by_position == [3 / 4, 1 / 2]
    assert stats.sigma == (3 + 1 + 2 + 2) / (4 * 3)
    assert stats.target_efficiency() == 0.5
    assert stats.acceptance_length == (4 + 6) / 6
