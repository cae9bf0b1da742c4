"""A day's raw data and the vendor's history of it, fetched and handed to the transformation.

Belongs here: finding and fetching raw-frames, raw-data and reference_bars, and saying which objects could not be
read. Does not belong here: what a normalized row is (market.transform).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import msgspec

from polygon_pipeline.lake import layout
from polygon_pipeline.lake.datasets import MissingDataset, fetch_dataset
from polygon_pipeline.lake.objects import decode_record
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import session_date
from polygon_pipeline.market.merge import Merge
from polygon_pipeline.market.reference import ReferenceInfo, read_reference_info
from polygon_pipeline.market.transform import NoBars, Normalization


@dataclass
class RawDay:
    """What a day was normalized from. unreadable: keys of objects that could not be read, each with the reason.

    reference: what the vendor's history of the day knows, None if the lake has none; merge: what it changed.
    """

    frame_files: int = 0
    records: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    reference: ReferenceInfo | None = None
    merge: Merge = field(default_factory=Merge)


def normalize_day(lake: Lake, day: date, channel: Channel, target: Path, folder: Path) -> RawDay:
    """Writes a day's normalized bars to a local Parquet file, from raw-frames and the raw-data they do not cover.

    The frames are the fuller record, so an object is read only where no frame has its bar: a bucket that another
    program fills in the specified format normalizes just as well. Minute bars are merged with the lake's
    reference_bars of the day, which also make a day that nobody collected. folder: an empty local folder.
    Raises NoBars.
    """
    raw = RawDay()
    with Normalization(day, channel, folder) as normalization:
        files = _fetch_frames(lake, day, folder)
        raw.frame_files = len(files)
        normalization.add_frames(list(files))
        keys = {bar: key for key in lake.keys(layout.raw_prefix(channel, day)) if (bar := layout.parse_raw_key(key))}
        uncovered = [keys[bar] for bar in normalization.uncovered(keys)]
        if uncovered:
            records = folder / "records.jsonl"
            raw.records = _fetch_records(lake, uncovered, day, records, raw.unreadable)
            normalization.add_records(records)
        if channel is Channel.MINUTE:
            with contextlib.suppress(MissingDataset):
                reference = fetch_dataset(lake, "reference_bars", day.isoformat(), folder)
                raw.reference = read_reference_info(reference)
                normalization.add_reference(reference)
        failure: NoBars | None = None
        try:
            raw.merge = normalization.write(target)
        except NoBars as error:
            failure = error
        raw.unreadable |= {files[file]: fault for file, fault in normalization.unreadable.items()}
    if failure and raw.unreadable:
        key, fault = next(iter(raw.unreadable.items()))
        raise NoBars(f"{failure} that can be read; {len(raw.unreadable)} cannot, such as {key}: {fault}") from failure
    if failure:
        raise failure
    return raw


def _fetch_frames(lake: Lake, day: date, folder: Path) -> dict[Path, str]:
    """Fetches the day's raw-frames, which a local lake has where they are; returns their keys by local file."""
    keys = lake.keys(layout.frames_prefix(day))
    if not lake.is_s3:
        return {lake.local_root / key: key for key in keys}
    paths = {key: folder / f"{number:06d}.jsonl.zst" for number, key in enumerate(keys)}
    lake.get_many(keys, lambda key, content: paths[key].write_bytes(content))
    return {path: key for key, path in paths.items()}


def _fetch_records(lake: Lake, keys: list[str], day: date, target: Path, unreadable: dict[str, str]) -> int:
    """Fetches raw-data objects into one file of a record a line; returns how many could be read."""
    lines: dict[str, bytes] = {}

    def use(key: str, content: bytes) -> None:
        try:
            record = decode_record(content)
        except ValueError as error:
            unreadable[key] = str(error)
            return
        start_ms = record.start_ms()
        if (record.ticker, start_ms) != layout.parse_raw_key(key) or session_date(start_ms) != day:
            unreadable[key] = f"the record inside is of {record.ticker} at {record.timestamp}, not what the key says"
            return
        lines[key] = msgspec.json.encode(record) + b"\n"

    lake.get_many(keys, use)
    target.write_bytes(b"".join(line for _, line in sorted(lines.items())))
    return len(lines)
