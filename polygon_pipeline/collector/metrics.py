"""A run's figures for Prometheus, served to this machine.

Belongs here: names, and serving. Does not belong here: counting: everything is read from the run's progress when it is
asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import date

import prometheus_client
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector, CollectorRegistry

from polygon_pipeline.collector.collector import Log, Progress
from polygon_pipeline.lake.lag import Histogram

# The limits of the exported buckets: 2^-10 s (1 ms) to 2^17 s (36 h), doubling. The run's own are finer.
_SHORTEST, _LONGEST = -10, 17


@contextlib.contextmanager
def serving(
    port: int | None,
    session_date: date,
    progress: Callable[[], Progress | None],
    day_state: Callable[[], str | None],
    log: Log,
) -> Iterator[None]:
    """Serves /metrics on 127.0.0.1 meanwhile, unless port is None. A port that cannot be had ends no run.

    progress: None while there is no run. day_state: the state of the session's day; None while it is not known.
    """
    if port is None:
        yield
        return
    registry = CollectorRegistry()
    registry.register(_Metrics(session_date, progress, day_state))
    try:
        server, thread = prometheus_client.start_http_server(port, "127.0.0.1", registry)
    except OSError as error:
        log.warning(
            f"No metrics are served: port {port} (POLYGON_METRICS_PORT) cannot be had: {error}. The collector goes on."
        )
        yield
        return
    log.info(f"metrics are served on http://127.0.0.1:{port}/metrics")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Metrics(Collector):
    def __init__(
        self, session_date: date, progress: Callable[[], Progress | None], day_state: Callable[[], str | None]
    ) -> None:
        self._session_date = session_date
        self._progress = progress
        self._day_state = day_state

    def collect(self) -> Iterator[Metric]:
        progress = self._progress()
        if progress is None:
            return
        account = progress.account
        yield InfoMetricFamily(
            "polygon_run", "The session that the run collects.", {"session_date": self._session_date.isoformat()}
        )
        for name, text, count in (
            ("frames", "Frames published.", account.frames),
            ("events", "Events in them.", account.events),
            ("bars", "Bars in them, revisions included.", account.bars),
            ("quarantined", "Events that could not be accepted.", account.quarantined),
            ("reconnects", "Connections after the first.", max(0, len(account.connections) - 1)),
            ("store_faults", "Writes that the lake did not take, and that were tried again.", progress.store_faults),
        ):
            yield CounterMetricFamily(f"polygon_{name}", f"{text} Since the run's start.", count)
        for name, text, value in (
            ("connected", "1 while bars flow, else 0.", float(progress.connected)),
            ("evicted", "1 while another connection has taken the feed over, else 0.", float(progress.evicted)),
            ("tickers", "Tickers that had a bar in this run.", progress.tickers),
            ("gaps", "Times between two connections, an open one included.", progress.gaps),
            ("backlog_frames", "Frames that wait in the journal.", progress.backlog_frames),
            ("backlog_bytes", "Bytes that wait in the journal.", progress.backlog_bytes),
            ("backlog_seconds", "The age of the oldest frame that waits.", progress.unpublished_seconds),
            ("disk_only_seconds", "The age of the oldest frame that is on this disk only.", progress.disk_only_seconds),
            ("store_down", "1 while the lake takes no writes, else 0.", float(progress.store_fault is not None)),
            ("journal_free_bytes", "What the journal's disk has left.", progress.journal_free_bytes),
            ("last_frame_timestamp_seconds", "When the last published frame came.", _timestamp(progress)),
            ("lease_age_seconds", "Since the lease was taken or renewed.", progress.lease_seconds),
        ):
            if value is not None:
                yield GaugeMetricFamily(f"polygon_{name}", text, value)
        complete = GaugeMetricFamily(
            "polygon_complete_through_timestamp_seconds",
            "The end of the last minute that is complete, of what is published.",
            labels=["channel"],
        )
        for channel, mark in progress.watermarks.items():
            complete.add_metric([channel], mark.through.timestamp() + 60)
        yield complete
        state = self._day_state()
        if state is not None:
            day = GaugeMetricFamily("polygon_day_state", "1 for the state that the day is in.", labels=["state"])
            day.add_metric([state], 1)
            yield day
        lags = HistogramMetricFamily(
            "polygon_lag_seconds",
            "From receiving a frame until it is synced in the journal, its bars' objects are put, its archive is put.",
            labels=["to"],
        )
        for to, histogram in (
            ("synced", account.lags.to_synced),
            ("object", account.lags.to_object),
            ("archive", account.lags.to_archive),
        ):
            lags.add_metric([to], _buckets(histogram), histogram.total_seconds)
        yield lags


def _timestamp(progress: Progress) -> float | None:
    last = progress.account.last_received_at
    return None if last is None else last.timestamp()


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    limited = [(str(limit), float(count)) for limit, count in histogram.cumulative(_SHORTEST, _LONGEST)]
    return [*limited, ("+Inf", float(histogram.count))]
