"""The fault matrix at the end of a test run: which faults were brought about, by how many tests, and what came of it.

Belongs here: collecting the rows and printing them. Does not belong here: the faults; a test says with its marker
`fault` which it brings about.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import pytest

_PROPERTY = "fault"


def note_faults(item: pytest.Item) -> None:
    """Keeps a test's faults with its reports, which come from another process than the one that prints."""
    for marker in item.iter_markers("fault"):
        item.user_properties.append((_PROPERTY, marker.args[0]))


def fault_matrix(reports: Iterable[pytest.TestReport]) -> list[str]:
    """One line a fault, in the order of their names. reports: of tests that were called, or could not be."""
    outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for report in reports:
        for name, fault in report.user_properties:
            if name == _PROPERTY:
                outcomes[str(fault)][report.outcome] += 1
    width = max(map(len, outcomes), default=0)
    return [
        f"{fault:{width}}  {counts['passed']:3} passed" + (f"  {counts['failed']:3} FAILED" if counts["failed"] else "")
        for fault, counts in sorted(outcomes.items())
    ]
