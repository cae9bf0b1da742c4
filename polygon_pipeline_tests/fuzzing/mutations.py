"""Samples become hostile inputs: a few random changes each, of bytes or of the JSON inside.

Belongs here: changes that know formats (JSON, CSV, lines, compressed files) but no parser. Does not belong here:
samples, and what must hold of an input (targets).
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa

# JSON values as text, because Python's writer knows neither all numbers nor deep nesting.
_TOKENS = [
    *(b"0", b"-0", b"-0.0", b"-1", b"1.5", b"0.1e1", b"1e30", b"-1e30", b"1e300", b"1e308", b"1.8e308", b"1e400"),
    *(b"5e-324", b"NaN", b"Infinity", b"-Infinity", b"9223372036854775807", b"9223372036854775808"),
    *(b"-9223372036854775809", b"18446744073709551616", b"253402300800000", b"-62135596800001", b"9" * 400),
    *(b"true", b"false", b"null", b"[]", b"{}", b"[null]", b'{"":0}', b'""', b'" "', b'"0"', b'"-0"', b'"1,234"'),
    *(b'"1e5"', b'"NaN"', b'".5"', b'"5."', b'"\xc3\xa9"', b'"\\ud800"', b'"\\u0000"', b'"\\ud83d\\ude00"', b'"\xff"'),
    *(b'"\xed\xa0\x80"', b'"../x"', b'"a/b"', b'"."', b'".."', b'"' + b"x" * 5000 + b'"', b'"AM"', b'"A"', b'"status"'),
    *(b'"0001-01-01T00:00:00Z"', b'"0001-01-01T00:00:00+23:59"', b'"9999-12-31T23:59:59.999999Z"', b'"2026-01-26"'),
    *(b'"9999-12-31T23:59:59-23:59"', b'"2026-01-26T18:30:00"', b'"2026-01-26T18:30:00.123456789Z"', b'"24:00"'),
    *(
        b'"2026-W05-1T18:30:00Z"',
        b'"20260126T183000Z"',
        b'"2026-01-26T18:30:60Z"',
        b"[" * 2000,
        b"[" * 500 + b"]" * 500,
    ),
    b'{"a":' * 500 + b"1" + b"}" * 500,
]
_BYTES = [
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r",
    b'"',
    b"\\",
    b"\\u",
    b",",
    b"{",
    b"}",
    b"[",
    b"]",
]
_BYTES += [b":", b"1e999", b"-", b"/", b"..", b"\x28\xb5\x2f\xfd", b"\x1f\x8b"]
_MARK = re.compile(rb'"@(\d+)@"')

Mutation = Callable[[random.Random, bytes], bytes]


def mutated(source: random.Random, sample: bytes) -> bytes:
    """The sample after one to four changes."""
    for _ in range(source.choice((1, 1, 1, 2, 3, 4))):
        sample = source.choice(_MUTATIONS)(source, sample)
    return sample


def compressed(source: random.Random, content: bytes, usual: Callable[[bytes], bytes]) -> bytes:
    """As a file may come: packed as usual or otherwise, and perhaps cut, damaged, or one behind another."""
    pack = source.choice((*[usual] * 13, _plain, zstd, gzip.compress))
    packed: bytes = pack(content)
    match source.randrange(16):
        case 0:
            return packed[: source.randrange(len(packed) + 1)]
        case 1:
            return _change_bytes(source, packed)
        case 2:
            return packed + pack(content)
        case 3:
            return packed + b"trailing"
    return packed


def _plain(content: bytes) -> bytes:
    return content


def zstd(content: bytes) -> bytes:
    """As archives are packed."""
    packed: bytes = pa.Codec("zstd", compression_level=1).compress(content, asbytes=True)
    return packed


def _change_bytes(source: random.Random, content: bytes) -> bytes:
    at = source.randrange(len(content) + 1)
    end = min(len(content), at + source.choice((1, 1, 2, 8, 64)))
    match source.randrange(6):
        case 0:
            return content[:at] + source.choice(_BYTES) + content[at:]
        case 1:
            return content[:at] + content[end:]
        case 2:
            return content[:end] + content[at:]
        case 3:
            return content[:at]
        case 4:
            return content[:at] + source.randbytes(end - at) + content[end:]
    return content[:at] + source.choice(_TOKENS) + content[end:]


def _change_json(source: random.Random, content: bytes) -> bytes:
    """Changes one line of JSON, or all if it is one value: a value, a key, an order, a repetition."""
    try:
        return _change_value(source, content)
    except (ValueError, RecursionError):  # it is no JSON, or not any more, or too deep for Python's writer
        return _change_cell(source, content)


def _change_value(source: random.Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    number = source.randrange(len(lines))
    whole = lines[number:] if number == 0 and content.startswith((b"{\n", b"[\n")) else lines[number : number + 1]
    value = json.loads(b"\n".join(whole))
    places = list(_places(value))
    if not places:
        return b"".join([*lines[:number], source.choice(_TOKENS)])
    holder, key = source.choice(places)
    change = source.randrange(6)
    if change == 0:
        del holder[key]
    elif change == 1:
        other, other_key = source.choice(places)
        holder[key] = json.loads(json.dumps(other[other_key]))
    elif change == 2 and isinstance(holder, dict):
        holder[source.choice([*holder, "", "ev", "frame", "x" * 300, "\u2028"])] = holder.pop(key)
    elif change == 3 and isinstance(holder, list):
        holder.extend(holder[key : key + 1] * source.choice((1, 2, 50)))
    else:
        holder[key] = f"@{source.randrange(len(_TOKENS))}@"
    text = json.dumps(value, ensure_ascii=bool(source.randrange(2)), indent=source.choice((None, None, 1)))
    # What was "\\ud800" before is half a character now, which has no bytes.
    encoded = _MARK.sub(lambda mark: _TOKENS[int(mark[1])], text.encode(errors="surrogatepass"))
    return b"\n".join([*lines[:number], encoded, *lines[number + len(whole) :]])


def _change_cell(source: random.Random, content: bytes) -> bytes:
    """Changes what is between two separators, in a CSV or in lines of NAME=VALUE."""
    cells = re.split(rb"([,\n=])", content)
    at = source.randrange(0, len(cells), 2)
    cells[at] = source.choice(
        [source.choice(cells[::2]), source.choice(_TOKENS), source.choice(_TOKENS).strip(b'"'), b""]
    )
    return b"".join(cells)


def _repeat_member(source: random.Random, content: bytes) -> bytes:
    """An object with a key twice."""
    members = list(re.finditer(rb'"[^"]{1,20}":\s*(?:"[^"]{0,40}"|[-0-9.eE]+|true|false|null)', content))
    if not members:
        return _change_bytes(source, content)
    member, target = source.choice(members), source.choice(members)
    name = member[0].partition(b":")[0]
    again = member[0] if source.randrange(2) else name + b":" + source.choice(_TOKENS)
    return content[: target.start()] + again + b"," + content[target.start() :]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value that holds another: what holds it, and its key or index there."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        keys = holder if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        found += [(holder, key) for key in keys]
        waiting += [holder[key] for key in keys]
    return found


_MUTATIONS: list[Mutation] = [_change_json, _change_json, _change_json, _change_json, _change_bytes, _repeat_member]
