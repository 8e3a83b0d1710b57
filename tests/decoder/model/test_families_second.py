"""The second third of all families: exact or refused, as ``docs/families.md`` says."""

from __future__ import annotations

import pytest
from support.families import FAMILY_NAMES
from support.families.findings import finding, stated
from support.versions import FAMILIES_PAGE_IS_OURS

THIRD = FAMILY_NAMES[1::3]


@pytest.mark.parametrize("name", THIRD)
def test_family_is_exact_or_refused(name: str) -> None:
    found = finding(name)
    if FAMILIES_PAGE_IS_OURS:
        assert found.line() == stated()[name], "`make families` writes the page anew"
