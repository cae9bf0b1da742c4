"""The fault matrix shows every fault that the run's tests have brought about, and what failed."""

from __future__ import annotations

from typing import Literal

import pytest

from polygon_pipeline_tests.support.fault_matrix import fault_matrix, note_faults


def _report(outcome: Literal["passed", "failed"], *faults: str) -> pytest.TestReport:
    properties: list[tuple[str, object]] = [("account", "30 kills"), *(("fault", fault) for fault in faults)]
    return pytest.TestReport("id", ("file", 1, "test"), {}, outcome, None, "call", user_properties=properties)


def test_the_matrix_has_a_row_for_each_fault_with_its_tests() -> None:
    reports = [_report("passed", "power loss", "kills"), _report("passed", "kills"), _report("failed", "kills")]
    assert fault_matrix([*reports, _report("passed")]) == [
        "kills         2 passed    1 FAILED",
        "power loss    1 passed",
    ]


def test_without_faults_there_is_no_matrix() -> None:
    assert fault_matrix([_report("passed")]) == []


def test_a_tests_markers_are_kept_with_its_reports(request: pytest.FixtureRequest) -> None:
    item: pytest.Item = request.node
    for fault in ("kills", "power loss"):
        item.add_marker(pytest.mark.fault(fault))
    note_faults(item)
    kept, item.user_properties = item.user_properties, []  # this test is no row
    assert sorted(kept) == [("fault", "kills"), ("fault", "power loss")]
