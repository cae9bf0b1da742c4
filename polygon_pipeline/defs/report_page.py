"""The session report's page: a trading day for people, in its materialization.

Belongs here: which figures it shows, and in which words. Does not belong here: the figures (datasets.report).

A page is made at every checkpoint: it is 3 to 6 kB, without its picture.
"""

from collections.abc import Sequence
from datetime import date
from typing import Any

import dagster as dg

from polygon_pipeline.datasets.day_state import DayStatus
from polygon_pipeline.datasets.report import Gap, Mover, Report
from polygon_pipeline.datasets.wording import change, count, number, percent, plain, span
from polygon_pipeline.defs.presenting import markdown_table, table
from polygon_pipeline.lake.lag import revisions_came
from polygon_pipeline.market.revisions import revised_for

# The UI shows Markdown that is shorter in the page itself, and longer behind a link.
_INLINE = 1_000
_GAPS = 6
_CAUSE = 60
_IN_A_SENTENCE = 3


def metadata(day: date, status: DayStatus, report: Report, checks: str) -> dict[str, Any]:
    """What the materialization shows. checks: how those of the whole day went, empty where none was made."""
    tickers = {
        "movers": [_mover_row(found) for found in (*report.up, *report.down)],
        "most_traded": [_mover_row(found) | _traded(found) for found in report.most_traded],
    }
    lag = report.lag_seconds
    return {
        "at_a_glance": dg.MetadataValue.md(summary(day, status, report, checks)),
        **({"gaps": table([_gap_row(gap) for gap in report.gaps[:_GAPS]])} if report.gaps else {}),
        **{name: markdown_table(rows) for name, rows in tickers.items() if rows},
        "bars": report.bars,
        "tickers": report.tickers,
        "gap_count": len(report.gaps),
        "missing_minutes": report.missing,
        "repaired_minutes": report.minutes["repaired_minutes"],
        "quarantined": report.quarantined,
        **({} if report.share is None else {"share": round(report.share, 6)}),
        **({} if lag is None else {"lag_p50_seconds": round(lag[0], 3), "lag_p99_seconds": round(lag[1], 3)}),
    }


def headline(status: DayStatus, report: Report) -> str:
    """The day in one line, for the event's message."""
    gaps = count(len(report.gaps), "gap") if report.gaps else "no gap"
    return f"{status.state}: {count(report.bars, 'bar')}, {_tickers(report)}, {gaps}"


def summary(day: date, status: DayStatus, report: Report, checks: str) -> str:
    """The day in a few lines of Markdown, short enough to stand in the page itself."""
    lines = [
        f"**{day:%A}, {day.day} {day:%B %Y}: {status.state}**, {status.detail}\n",
        f"- {_feed(report)}",
        f"- {_bars(report)}",
        f"- {_gaps(report)}",
        f"- {_share(report)}",
        f"- in quarantine: {report.quarantined or 'nothing'}",
        *([f"- checks: {plain(checks)}"] if checks else []),
        *_lag(report),
        *([f"- {revisions_came(report.revisions, revised_for())}"] if report.revisions else []),
        *(_moved("up", report.up)),
        *(_moved("down", report.down)),
    ]
    found = ""
    for line in lines:
        if len(found) + len(line) + 1 >= _INLINE:
            break
        found += line + "\n"
    return found


def _feed(report: Report) -> str:
    if not report.feeds:
        return "no collector of this project was at work; the bars come from the vendor's history or another program"
    return "feed: " + ", ".join("**SIMULATED**" if feed == "simulated" else plain(feed) for feed in report.feeds)


def _tickers(report: Report) -> str:
    return (
        f"{report.tickers:,} of {report.asked_for:,} tickers" if report.asked_for else count(report.tickers, "ticker")
    )


def _bars(report: Report) -> str:
    where = f", {span(report.first_bar, report.last_bar)} New York" if report.first_bar and report.last_bar else ""
    return f"{count(report.bars, 'bar')}, {_tickers(report)}{where}, {count(report.volume, 'share')}"


def _gaps(report: Report) -> str:
    if not report.gaps:
        return "no gap"
    shown = "; ".join(f"{span(gap.first, gap.last)} ({_fate(gap)})" for gap in report.gaps[:_IN_A_SENTENCE])
    more = len(report.gaps) - _IN_A_SENTENCE
    return f"{count(len(report.gaps), 'gap')}, New York: {shown}" + (f"; and {more} more" if more > 0 else "")


def _fate(gap: Gap) -> str:
    """What became of a gap."""
    parts = [count(gap.repaired, "bar") + " repaired"] if gap.repaired else []
    parts += [count(gap.missing, "bar") + " missing"] if gap.missing else []
    if not gap.is_known:
        parts.append("the history does not reach over it yet")
    return ", ".join(parts) or "nothing traded in it"


def _share(report: Report) -> str:
    if report.share is None:
        return "no history yet that says which minutes traded"
    if not report.missing:
        return "every traded minute that the history knows is there"
    return f"{percent(report.share)} of the traded minutes are there, {count(report.missing, 'bar')} missing"


def _lag(report: Report) -> list[str]:
    if report.lag_seconds is None:
        return []
    return [
        "- half of the bars came within {:,.1f} s of their end, 99 of 100 within {:,.1f} s".format(*report.lag_seconds)
    ]


def _moved(direction: str, movers: Sequence[Mover]) -> list[str]:
    named = [f"{plain(found.ticker)} {change(found.day_return)}" for found in movers[:_IN_A_SENTENCE]]
    return [f"- {direction}: {', '.join(named)}"] if named else []


def _gap_row(gap: Gap) -> dict[str, str | int]:
    return {
        "New York": span(gap.first, gap.last),
        "minutes": int((gap.last - gap.first).total_seconds()) // 60 + 1,
        "cause": gap.cause if len(gap.cause) <= _CAUSE else gap.cause[: _CAUSE - 1] + "…",
        "what became of it": _fate(gap),
    }


def _mover_row(mover: Mover) -> dict[str, str]:
    return {
        "ticker": plain(mover.ticker),
        "last price": number(mover.last_price),
        "regular hours": change(mover.day_return),
    }


def _traded(mover: Mover) -> dict[str, str]:
    return {"shares": f"{mover.volume:,.0f}", "of all shares": percent(mover.share_of_volume, 1)}
