"""The vendor's spelling as DuckDB reads it: types and columns, generated from the decoders' own structs.

Belongs here: which DuckDB type a field has, and which field each of our columns comes from. Does not belong here: what
a field means and what is accepted (polygon.messages, polygon.rest), and the statements around it (datasets).

A statement reads frames of accepted events only. Where DuckDB cannot read a frame as the types say (a bare object, a
repeated key), the decoder reads it instead (datasets.normalize), so that both give one meaning to every frame.
"""

from __future__ import annotations

import typing
from types import UnionType

import msgspec

from polygon_pipeline.polygon.messages import MinuteAggregate
from polygon_pipeline.polygon.rest import HistoryBar

# Of a union, the first of these that is in it: a float holds any int that the vendor sends.
_TYPES = {str: "VARCHAR", float: "DOUBLE", int: "BIGINT", bool: "BOOLEAN"}


def struct_type(struct: type[msgspec.Struct]) -> str:
    """The DuckDB type of a struct as JSON has it, such as `STRUCT(sym VARCHAR, s DOUBLE)`."""
    fields = [f"{field.encode_name} {_type(field.type)}" for field in msgspec.structs.fields(struct)]
    if tag := struct.__struct_config__.tag_field:
        fields.insert(0, f"{tag} VARCHAR")
    return f"STRUCT({', '.join(fields)})"


def _type(annotation: object) -> str:
    is_union = typing.get_origin(annotation) in (UnionType, typing.Union)
    members = [_plain(member) for member in (typing.get_args(annotation) if is_union else (annotation,))]
    return next((name for kind, name in _TYPES.items() if kind in members), "VARCHAR")  # Any: its JSON as text


def _plain(annotation: object) -> object:
    """A type without its bounds."""
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


# A frame: an array of events.
EVENTS_TYPE = f"{struct_type(MinuteAggregate)}[]"

# The columns of a bar as it arrived, from an event `e`; messages.arrival gives the same from the decoded event.
ARRIVAL_COLUMNS = """
    e.sym AS ticker, CAST(e.s AS BIGINT) AS start_ms, coalesce(e.o, nullif(e.op, 0)) AS open, e.h AS high, e.l AS low,
    e.c AS close, coalesce(CAST(e.dv AS DOUBLE), e.v) AS volume, e.vw AS vwap, nullif(e.op, 0) AS day_open,
    coalesce(TRY_CAST(e.dav AS DOUBLE), e.av) AS day_volume, e.a AS day_vwap, e.z AS average_trade_size,
    coalesce(e.otc, false) AS otc
"""
EVENT_CHANNEL = "e.ev"
EVENT_START_MS = "e.s"

# A REST answer's bars, and our columns of one of them, `bar`.
HISTORY_BARS_TYPE = f"{struct_type(HistoryBar)}[]"
HISTORY_BAR_COLUMNS = ", ".join(
    f"bar.{field.encode_name} AS {field.name}" for field in msgspec.structs.fields(HistoryBar)
)

# A flat file: `$columns` are FLAT_FILE_COLUMNS, and these are ours.
FLAT_FILE_START_MS = "window_start // 1000000"
