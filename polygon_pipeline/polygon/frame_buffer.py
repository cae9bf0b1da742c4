"""A hook into websocket-client's private frame_buffer: bounded messages, and few calls to the system.

Belongs here: everything that depends on that library's inside. Does not belong here: the connection (polygon.stream).

It holds for websocket-client 1.9 (pyproject.toml admits no other): there `WebSocket.frame_buffer` asks its `recv(size)`
for the bytes of a frame piece by piece, and has read a frame's head into `header` and its announced length into
`length` when `recv_length()` returns, before it reads the payload. verify() plays both on a buffer of its own and fails
where they do not hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import websocket

# The whole market's minute in one message is 2.5 MB. What is larger is no message of this feed, and would fill memory.
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
# From a message's first frame to its last. A line that needs longer for the market's minute falls behind.
MESSAGE_SECONDS = 30.0

_BUFFER_BYTES = 256 * 1024
_OPCODE_INDEX = 4  # in a frame's header as the library keeps it


class MessageRefused(Exception):
    """A message that this feed cannot have: too large, or without an end."""


class UnsupportedLibrary(Exception):
    """The installed websocket-client is not one that this module fits."""


def install(socket: websocket.WebSocket, before_receiving: Callable[[], None]) -> None:
    """Makes a socket refuse messages, be they of one frame or of many, above MAX_MESSAGE_BYTES or MESSAGE_SECONDS, and
    receive up to 256 KiB at once.

    before_receiving: called whenever the system is about to be asked for more, and at every further frame of a message;
    what it raises comes out of reading. Reading may also raise MessageRefused.
    """
    _bound(socket.frame_buffer, before_receiving)
    _read_ahead(socket.frame_buffer, before_receiving)


def verify() -> None:
    """Raises UnsupportedLibrary where install() would not do what it promises."""
    try:
        huge = b"\x7f" + bytes([0, 0, 1] + [0] * 5)
        fits = _received(b"\x82\x03abc\x82\x00") == [b"abc", b""] and _refuses(b"\x82" + huge)
        fits = fits and _refuses(b"\x02\x01a\x80\x7f" + MAX_MESSAGE_BYTES.to_bytes(8))
    except Exception as error:
        raise UnsupportedLibrary(_unsupported(f"{type(error).__name__}: {error}")) from error
    if not fits:
        raise UnsupportedLibrary(_unsupported("frames are not read as expected"))


def _unsupported(reason: str) -> str:
    version = getattr(websocket, "__version__", "of an unknown version")
    return (
        f"websocket-client {version} reads frames in another way than this project relies on ({reason}). Install the "
        "version that pyproject.toml asks for: pip install 'websocket-client>=1.9,<1.10'"
    )


def _bound(buffer: Any, before_receiving: Callable[[], None]) -> None:
    """Refuses a message by the lengths that its frames announce, before a payload is read into memory; the library
    itself puts frames together without end."""
    read_length = buffer.recv_length
    size, began = 0, 0.0

    def recv_length() -> None:
        nonlocal size, began
        read_length()
        opcode = buffer.header[_OPCODE_INDEX]
        if opcode == websocket.ABNF.OPCODE_CONT:
            size += buffer.length
            before_receiving()
            if time.monotonic() - began > MESSAGE_SECONDS:
                raise MessageRefused(f"a message of the server did not end within {MESSAGE_SECONDS:.0f} s")
        elif opcode in (websocket.ABNF.OPCODE_TEXT, websocket.ABNF.OPCODE_BINARY):
            size, began = buffer.length, time.monotonic()
        announced = max(size, buffer.length)
        if announced > MAX_MESSAGE_BYTES:
            raise MessageRefused(f"the server announced a message of {announced} bytes, above {MAX_MESSAGE_BYTES}")

    buffer.recv_length = recv_length


def _read_ahead(buffer: Any, before_receiving: Callable[[], None]) -> None:
    """Takes what has arrived at once: asking the system for every header and length costs more than all the rest, and
    each time the stream may have to wait its turn behind the thread that publishes."""
    receive = buffer.recv
    waiting = memoryview(b"")

    def buffered(size: int) -> bytes:
        nonlocal waiting
        if not waiting:
            before_receiving()
            waiting = memoryview(receive(_BUFFER_BYTES))
        taken, waiting = waiting[:size], waiting[size:]
        return bytes(taken)

    buffer.recv = buffered


def _received(content: bytes) -> list[bytes]:
    """The payloads of two frames that arrive in one piece."""
    socket = websocket.WebSocket(skip_utf8_validation=True)
    pieces = [content]
    socket.frame_buffer.recv = lambda _size: pieces.pop()
    install(socket, lambda: None)
    return [socket.frame_buffer.recv_frame().data for _ in range(2)]


def _refuses(head: bytes) -> bool:
    try:
        _received(head)
    except MessageRefused:
        return True
    return False
