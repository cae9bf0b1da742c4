"""The asset checks: what must hold of a day's datasets.

Belongs here: how rules show in Dagster. Does not belong here: the rules (datasets.quality, datasets.coverage,
datasets.day_state, lake.ledger).

A check is made with its dataset, for every day of the run, and each day's materialization says how its checks went. The
check itself shows the last run: days in it that failed, and nothing of other days. So a day that can never be mended
colours no other day.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import dagster as dg

from polygon_pipeline.collector.lease import live_run
from polygon_pipeline.datasets import quality
from polygon_pipeline.datasets.catalog import BAR_COVERAGE, DAILY_BARS, DAILY_DIFFERENCES, NORMALIZED, Dataset
from polygon_pipeline.datasets.coverage import below
from polygon_pipeline.datasets.day_state import DayState
from polygon_pipeline.datasets.making import MadeDataset
from polygon_pipeline.lake.ledger import reconcile
from polygon_pipeline.lake.store import Lake

# What share of a ticker's traded minutes must be there, from the stream or by repair.
LEAST_SHARE = 0.99

_NAMED = 20

_OF_BARS = {
    "schema": "The file's columns and types are the documented ones.",
    **quality.ROW_RULES,
    "every_object_readable": "Every raw object of the day could be read.",
    "ledger_balances": "What the collector received is accounted for, and the objects it counted are on the lake.",
}
_RULES: dict[str, dict[str, str]] = {
    **{dataset.name: _OF_BARS for dataset in NORMALIZED.values()},
    BAR_COVERAGE.name: {
        "traded_minutes_are_there": "Every ticker has its share of the minutes in which it traded, as far as the "
        "history knows."
    },
    DAILY_BARS.name: {
        "day_is_complete": "The day is known to its session's end; a warning while the session runs, an error after it."
    },
    DAILY_DIFFERENCES.name: {
        "differences_are_explained": "Where our day and the vendor's differ, the day's minutes show why. A warning "
        "names the values that nothing explains."
    },
}


@dataclass(frozen=True)
class DayResult:
    """One rule's result for one day."""

    asset: str
    rule: str
    passed: bool
    metadata: dict[str, Any] = field(default_factory=dict)
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR


def specs(datasets: Iterable[Dataset]) -> list[dg.AssetCheckSpec]:
    """The checks of these datasets."""
    return [
        dg.AssetCheckSpec(rule, asset=dataset.name, description=text)
        for dataset in datasets
        for rule, text in _RULES.get(dataset.name, {}).items()
    ]


def check_day(lake: Lake, made: MadeDataset, least_share: float = LEAST_SHARE) -> Iterator[DayResult]:
    """Checks one dataset of one day. After a wrong schema the other rules are left out, as they read those columns."""
    name = made.dataset.name
    if made.dataset in NORMALIZED.values():
        errors = quality.schema_errors(made.file, made.dataset)
        yield DayResult(name, "schema", not errors, {"errors": errors})
        if errors:
            return
        for rule, verdict in quality.check_rows(made.file, made.day).items():
            found = {"broken_rows": verdict.broken, "examples": verdict.examples}
            yield DayResult(name, rule, not verdict.broken, found)
        unreadable = [f"{key}: {why}" for key, why in sorted(made.facts.get("unreadable_objects", {}).items())]
        yield DayResult(name, "every_object_readable", not unreadable, {"unreadable_objects": unreadable[:_NAMED]})
        balance = reconcile(lake, made.day, made.dataset.channel)
        if balance.unfinished and made.status.state is not DayState.FINAL:
            balance.errors.extend(_without_an_end(run) for run in balance.unfinished if run != live_run(lake))
        yield DayResult(name, "ledger_balances", not balance.errors, balance._asdict())
    elif made.dataset == BAR_COVERAGE:
        short = below(made.file, least_share)
        named = [f"{found.ticker}: {found.collected} of {found.traded} minutes" for found in short[:_NAMED]]
        found = {"tickers_below": len(short), "least_share": least_share, "worst": named}
        yield DayResult(name, "traded_minutes_are_there", not short, found)
    elif made.dataset == DAILY_BARS:
        status = made.status
        yield DayResult(
            name,
            "day_is_complete",
            status.state in (DayState.COMPLETE, DayState.FINAL),
            {"state": str(status.state), "detail": status.detail},
            dg.AssetCheckSeverity.ERROR if status.is_over else dg.AssetCheckSeverity.WARN,
        )
    elif made.dataset == DAILY_DIFFERENCES:
        found = {name: made.facts.get(name, []) for name in ("outcome", "unexplained")}
        unexplained = made.facts.get("tickers_unexplained", 0)
        found["tickers_unexplained"] = unexplained
        yield DayResult(name, "differences_are_explained", not unexplained, found, dg.AssetCheckSeverity.WARN)


def _without_an_end(run: str) -> str:
    return (
        f"{run}: its account has no end, and nobody collects in its name. What it had not published is in its journal, "
        "on the machine that it ran on, until a start or drain_journals there; if that disk is lost, the vendor's "
        "history replaces it"
    )


def summary(results: Sequence[DayResult]) -> str:
    """A day's checks in one line, for its materialization."""
    failed = [result.rule for result in results if not result.passed]
    return f"{len(results) - len(failed)} of {len(results)} passed" + (
        f"; failed: {', '.join(failed)}" if failed else ""
    )


def as_check_results(
    results: dict[date, list[DayResult]], wanted: Collection[dg.AssetCheckKey]
) -> Iterator[dg.AssetCheckResult]:
    """One result per check, over all days: passed where it passed on every day that it was made for."""
    for key in sorted(wanted, key=str):
        mine = {
            day: result
            for day, of_day in sorted(results.items())
            for result in of_day
            if (result.asset, result.rule) == (key.asset_key.to_user_string(), key.name)
        }
        if not mine:
            continue  # no day got so far: the run says why
        failed = {day: result for day, result in mine.items() if not result.passed}
        days = f"{min(mine)}" if len(mine) == 1 else f"{len(mine)} days, {min(mine)} to {max(mine)}"
        more = f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
        failed_days = ", ".join([str(day) for day in failed][:_NAMED]) + more
        is_error = any(result.severity is dg.AssetCheckSeverity.ERROR for result in failed.values())
        shown = next(iter(failed.values())) if len(mine) > 1 and failed else mine[max(mine)]
        yield dg.AssetCheckResult(
            asset_key=key.asset_key,
            check_name=key.name,
            passed=not failed,
            severity=dg.AssetCheckSeverity.ERROR if is_error or not failed else dg.AssetCheckSeverity.WARN,
            # The history of a check shows this of each execution, and the metadata behind a button.
            description=f"fails for {failed_days}" if failed else f"holds for {days}",
            metadata={
                "days": days,
                "failed_days": failed_days or "none",
                **{name: _in_the_page(value) for name, value in shown.metadata.items()},
            },
        )


def _in_the_page(value: Any) -> Any:
    """A list as text, because the UI shows one behind a link."""
    return ("; ".join(value) or "none") if isinstance(value, list) else value
