"""The project's definitions on the cluster: the demo's session comes from the test's exchange, over the network.

Belongs here: what differs from support.fast_demo, set from the environment variables below. Does not belong here:
anything that would change what the project does.

CLUSTER_EXCHANGE: the stream's URL. CLUSTER_OVER: a file that exists when the session is over.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from polygon_pipeline import demo
from polygon_pipeline.lake.ledger import SESSION_OVER
from polygon_pipeline.settings import Settings
from polygon_pipeline_tests.support import fast_demo as _fast_demo  # first: it changes the sensors' decorator


@contextmanager
def _exchange(wanted: Settings, day: date) -> Iterator[tuple[str, Callable[[], str | None]]]:
    over = Path(os.environ["CLUSTER_OVER"])
    yield os.environ["CLUSTER_EXCHANGE"], lambda: SESSION_OVER if over.exists() else None


demo.exchange = _exchange

from polygon_pipeline.definitions import build_defs  # noqa: E402

defs = build_defs()
del _fast_demo
