"""Runs ``interpreted/`` file by file in children where Triton is imported to be interpreted."""

from pathlib import Path

import pytest
from support.versions import needs_loops_in_the_interpreter

FOLDER = Path(__file__).parent / "interpreted"


@needs_loops_in_the_interpreter
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_interpreted(file, interpret):
    interpret(FOLDER / file)
