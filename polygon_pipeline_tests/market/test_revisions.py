"""How long revisions are waited for."""

from __future__ import annotations

from datetime import timedelta

import pytest

from polygon_pipeline.market.revisions import VARIABLE, collected_after, revised_for, settled_after


def test_every_waiting_time_follows_from_one_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert [found / timedelta(minutes=1) for found in (revised_for(), settled_after(), collected_after())] == [
        15,
        16,
        20,
    ]
    monkeypatch.setenv(VARIABLE, " 30 ")
    assert [found / timedelta(minutes=1) for found in (revised_for(), settled_after(), collected_after())] == [
        30,
        31,
        35,
    ]


@pytest.mark.parametrize("text", ["", "0", "241", "-5", "15.5", "fifteen", "٣٠"])
def test_a_value_that_is_none_counts_as_not_set(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    assert revised_for() == timedelta(minutes=15)
