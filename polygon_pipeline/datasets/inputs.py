"""A day's raw data and the vendor's history of it, fetched and handed to the normalization.

Belongs here: finding and fetching raw-frames, raw-data and the reference, and naming the objects that could not be
read. Does not belong here: what a normalized row is (datasets.normalize).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path

from polygon_pipeline.datasets.catalog import REFERENCE_BARS, Dataset
from polygon_pipeline.datasets.merge import Merge
from polygon_pipeline.datasets.normalize import NoBars, Normalization
from polygon_pipeline.datasets.reference import ReferenceInfo, UnreadableReference, read_reference_info
from polygon_pipeline.datasets.session import DuckSession
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.dataset_files import MissingDataset, fetch_dataset
from polygon_pipeline.lake.ledger import read_ledgers
from polygon_pipeline.lake.records import BarRecord, decode_record
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import trade_date
from polygon_pipeline.polygon.messages import Arrival


@dataclass
class RawDay:
    """What a day was normalized from. unreadable: keys of objects that could not be read, or not whole, each with the
    reason. strays: keys among the raw data that are neither bars' nor archives', and were left alone.

    reference: what the vendor's history of the day knows, None if the lake has none; merge: what it changed.
    """

    frame_files: int = 0
    records: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)
    reference: ReferenceInfo | None = None
    merge: Merge = field(default_factory=Merge)


@dataclass(frozen=True)
class RawInputs:
    """What is fetched before a day is normalized. frames: keys by local file; objects: keys of raw-data by bar.

    unreadable, strays: as in RawDay, as far as they are known.
    revised: of these bars, those whose object may be a later revision than any frame of theirs.
    """

    day: date
    channel: Channel
    frames: dict[Path, str]
    objects: dict[tuple[str, int], str]
    reference: Path | None
    unreadable: dict[str, str]
    strays: list[str]
    revised: frozenset[tuple[str, int]]


def fetch_raw(lake: Lake, day: date, channel: Channel, folder: Path) -> RawInputs:
    """Fetches what a day's normalized bars are made of, but for the objects that the frames may cover."""
    written = lake.modified(layout.raw_prefix(channel, day))
    archives = lake.modified(layout.frames_prefix(day))
    objects = {bar: key for key in written if (bar := layout.parse_raw_key(key))}
    unreadable: dict[str, str] = {}
    frames = [key for key in archives if layout.is_frames_key(key)]
    # An archive that comes from here on is not fetched, and so no object is passed over because of it.
    revised = _maybe_revised(
        lake, day, {bar: written[key] for bar, key in objects.items()}, [archives[key] for key in frames]
    )
    ours = {*objects.values(), *frames}
    return RawInputs(
        day,
        channel,
        _fetch_frames(lake, frames, folder),
        objects,
        fetch_reference(lake, day, folder, unreadable) if channel is REFERENCE_BARS.channel else None,
        unreadable,
        [key for key in (*written, *archives) if key not in ours],
        revised,
    )


def _maybe_revised(
    lake: Lake, day: date, objects: Mapping[tuple[str, int], datetime], archived: Iterable[datetime]
) -> frozenset[tuple[str, int]]:
    """The bars whose object may be later than their frames: a run writes an object before the archive with its frame.

    So it was written after every archive, or some run archived nothing; then each of them may be. objects, archived:
    when each was written.
    """
    if any(not ledger.write_frames for ledger in read_ledgers(lake, day).ledgers):
        return frozenset(objects)
    last = max(archived, default=None)
    return frozenset(bar for bar, written in objects.items() if last and written > last)


def fetch_reference(
    lake: Lake, day: date, folder: Path, unreadable: dict[str, str] | None = None, dataset: Dataset = REFERENCE_BARS
) -> Path | None:
    """The day's reference as a local file, or None where the lake has none that can be read.

    unreadable: gets the key of one that cannot be read, with the reason. dataset: reference_bars or
    reference_daily_bars.
    """
    try:
        file = fetch_dataset(lake, dataset.name, day.isoformat(), folder)
        read_reference_info(file, dataset)
    except MissingDataset:
        return None
    except UnreadableReference as error:
        if unreadable is not None:
            unreadable[layout.dataset_key(dataset.name, day.isoformat())] = str(error)
        return None
    return file


def normalize_day(lake: Lake, inputs: RawInputs, target: Path, space: Path | DuckSession) -> RawDay:
    """Writes a day's normalized bars to a local Parquet file, from raw-frames and the raw-data they do not cover.

    The frames are the fuller record, so an object is read only where no frame has its bar or where it may be a later
    revision: a bucket that another program fills in the specified format normalizes just as well. Minute bars are
    merged with the lake's reference of the day, which alone also makes a day that no collector recorded. space: as in
    DuckSession. Raises NoBars.
    """
    raw = RawDay(len(inputs.frames), unreadable=dict(inputs.unreadable), strays=inputs.strays)
    with Normalization(inputs.day, inputs.channel, space) as normalization:
        normalization.add_frames(list(inputs.frames))
        wanted = inputs.revised.union(normalization.uncovered(inputs.objects))
        if wanted:
            bars = _fetch_records(lake, sorted(inputs.objects[bar] for bar in wanted), inputs.day, raw.unreadable)
            raw.records = normalization.add_bars(bars)
        if inputs.reference is not None:
            raw.reference = read_reference_info(inputs.reference)
            normalization.add_reference(inputs.reference)
        failure: NoBars | None = None
        try:
            raw.merge = normalization.write(target)
        except NoBars as error:
            failure = error
        reference_key = layout.dataset_key(REFERENCE_BARS.name, inputs.day.isoformat())
        raw.unreadable |= {
            inputs.frames.get(file, reference_key): reason for file, reason in normalization.unreadable.items()
        }
    if failure and raw.unreadable:
        key, reason = next(iter(raw.unreadable.items()))
        raise NoBars(f"{failure} that can be read; {len(raw.unreadable)} cannot, such as {key}: {reason}") from failure
    if failure:
        raise failure
    return raw


def _fetch_frames(lake: Lake, keys: list[str], folder: Path) -> dict[Path, str]:
    """Fetches raw-frames, which a local lake has where they are; returns their keys by local file."""
    if not lake.is_s3:
        return {lake.local_root / key: key for key in keys}
    paths = {key: folder / f"{number:06d}.jsonl.zst" for number, key in enumerate(keys)}
    lake.get_many(keys, lambda key, content: paths[key].write_bytes(content))
    return {path: key for key, path in paths.items()}


def _fetch_records(
    lake: Lake, keys: list[str], day: date, unreadable: dict[str, str]
) -> list[tuple[Arrival, datetime]]:
    """Fetches raw-data objects: their bars, each with when it was collected, in the order of the keys."""
    found: dict[str, tuple[Arrival, datetime]] = {}

    def use(key: str, content: bytes) -> None:
        try:
            record = decode_record(content)
        except ValueError as error:
            unreadable[key] = str(error)
            return
        start_ms = record.start_ms()
        if (record.ticker, start_ms) != layout.parse_raw_key(key) or trade_date(start_ms) != day:
            unreadable[key] = f"the record inside is of {record.ticker} at {record.timestamp}, not what the key says"
            return
        found[key] = arrival(record), datetime.fromisoformat(record.collected_at)

    lake.get_many(keys, use)
    return [bar for _, bar in sorted(found.items())]


def arrival(record: BarRecord) -> Arrival:
    """A record's bar as the normalization takes it; a record knows nothing of the day so far."""
    bar = record.bar_data
    return Arrival(
        record.ticker,
        record.start_ms(),
        bar.open,
        bar.high,
        bar.low,
        bar.close,
        float(bar.volume),
        bar.vwap,
    )
