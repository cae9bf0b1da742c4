"""Three trading days of two tickers: minute bars, and the days' official bars. Real ones where they are at hand.

Real ones lie beside the checkout, in ../shared/data/real-bars, or in the folder that REAL_BARS_DIR names. Where there
are none, as in an ordinary clone, bars of the synthetic market are written in the same format; then every difference
between a made day and the official one is an error. REAL_BARS_DIR=/nowhere hides the real ones.

    minute.csv      ticker,start_ms,open,high,low,close,volume      sorted by ticker and start; volume: whole shares
    daily.csv       ticker,date,open,high,low,close,volume          regular hours
"""

from __future__ import annotations

import csv
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from polygon_pipeline.market.calendar import session, trade_date, trading_days
from polygon_pipeline.simulator.synthetic import SyntheticMarket

_BESIDE_THE_CHECKOUT = Path(__file__).parents[3] / "shared" / "data" / "real-bars"
_PRICES = ("open", "high", "low", "close")

_TICKERS = ("GME", "UHT")  # one trades nearly every minute, the other rarely
_SEED = 7
_DAYS = trading_days(date(2026, 1, 26), date(2026, 1, 28))

Row = dict[str, str]


@dataclass(frozen=True)
class RecordedBars:
    """A folder with minute.csv and daily.csv. is_real: as the vendor and the exchanges had them."""

    folder: Path
    is_real: bool

    @property
    def minute_file(self) -> Path:
        return self.folder / "minute.csv"

    def bars(self) -> list[Row]:
        return _read(self.minute_file)

    def official_days(self) -> list[Row]:
        return _read(self.folder / "daily.csv")

    @property
    def tickers(self) -> list[str]:
        return sorted({bar["ticker"] for bar in self.bars()})

    @property
    def days(self) -> list[str]:
        return sorted({day_of(bar) for bar in self.bars()})

    def counts(self, day: str) -> list[tuple[str, int]]:
        """How many bars each ticker has on that day."""
        return sorted(Counter(bar["ticker"] for bar in self.bars() if day_of(bar) == day).items())

    @property
    def extremes_tolerance(self) -> float:
        """How far the official high and low may be from the bars': real ones leave some trades out."""
        return 0.1 if self.is_real else 0.0

    @property
    def tickers_with_exact_volume(self) -> list[str]:
        """Those whose official volume is the sum of the bars'. Of the real ones, IBM's differs by a little."""
        return ["SPY"] if self.is_real else self.tickers


def day_of(bar: Row) -> str:
    return trade_date(int(bar["start_ms"])).isoformat()


def recorded_bars(folder: Path) -> RecordedBars:
    """The real bars, or else made ones, which are written into the folder."""
    real = Path(os.environ.get("REAL_BARS_DIR") or _BESIDE_THE_CHECKOUT)
    if (real / "minute.csv").exists():
        return RecordedBars(real, is_real=True)
    bars = _made_bars()
    _write(folder / "minute.csv", ["ticker", "start_ms", *_PRICES, "volume"], bars)
    _write(folder / "daily.csv", ["ticker", "date", *_PRICES, "volume"], _official_days(bars))
    return RecordedBars(folder, is_real=False)


def _made_bars() -> list[Row]:
    market = SyntheticMarket(_TICKERS, _SEED)
    bars = [bar for day in _DAYS for bar in market.day_bars(day).to_pylist()]
    return [
        {
            "ticker": bar["ticker"],
            "start_ms": str(bar["start_ms"]),
            **{name: repr(bar[name]) for name in _PRICES},
            "volume": str(int(bar["volume"])),
        }
        for bar in sorted(bars, key=lambda bar: (bar["ticker"], bar["start_ms"]))
    ]


def _official_days(bars: Iterable[Row]) -> list[Row]:
    """What plain Python makes of the bars of the regular hours."""
    regular: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for bar in bars:
        hours = session(date.fromisoformat(day_of(bar)))
        assert hours
        if hours.open.timestamp() * 1000 <= int(bar["start_ms"]) < hours.close.timestamp() * 1000:
            regular[bar["ticker"], day_of(bar)].append(bar)
    return [
        {
            "ticker": ticker,
            "date": day,
            "open": found[0]["open"],
            "high": max((bar["high"] for bar in found), key=float),
            "low": min((bar["low"] for bar in found), key=float),
            "close": found[-1]["close"],
            "volume": str(sum(int(bar["volume"]) for bar in found)),
        }
        for (ticker, day), found in sorted(regular.items())
    ]


def _read(file: Path) -> list[Row]:
    with file.open() as opened:
        return list(csv.DictReader(opened))


def _write(file: Path, columns: list[str], rows: Iterable[Row]) -> None:
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
