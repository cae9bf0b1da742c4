"""Whether a store keeps the conditions that the lease rests on: a folder and a real S3 server do, and fakes do not."""

from __future__ import annotations

from typing import Any

import obstore
import pytest

from polygon_pipeline.lake import layout
from polygon_pipeline.lake.probe import ConditionIgnored, probe
from polygon_pipeline.lake.store import Lake


def test_a_store_that_keeps_conditions_is_found_so_again_and_again_and_holds_one_more_object(lake: Lake) -> None:
    for content in (b'{"time": 1}', b'{"time": 2}'):
        probe(lake, content)
        assert lake.get(layout.DOCTOR_KEY) == content
    assert lake.keys("") == [layout.DOCTOR_KEY]


@pytest.mark.parametrize(("ignored", "named"), [(str, "If-None-Match"), (dict, "If-Match")])
def test_a_store_that_ignores_a_condition_is_found(
    ignored: type, named: str, s3_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = obstore.put

    def careless(store: Any, key: str, content: bytes, *, mode: Any) -> Any:
        return put(store, key, content, mode="overwrite" if isinstance(mode, ignored) else mode)

    monkeypatch.setattr(obstore, "put", careless)
    with pytest.raises(ConditionIgnored, match=named):
        probe(s3_lake, b"{}")
