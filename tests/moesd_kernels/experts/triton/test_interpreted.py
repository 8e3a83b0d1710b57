"""Runs ``interpreted/`` in a child where Triton is imported to be interpreted."""

from pathlib import Path

from support.versions import needs_loops_in_the_interpreter


@needs_loops_in_the_interpreter
def test_interpreted(interpret):
    interpret(Path(__file__).parent / "interpreted")
