"""A hook into websocket-client's private frame_buffer: bounded frames, and few calls to the system.

Belongs here: everything that depends on that library's inside. Does not belong here: the connection (polygon.stream).

It holds for websocket-client 1.9 (pyproject.toml admits no other): there `WebSocket.frame_buffer` asks its `recv(size)`
for the bytes of a frame piece by piece, and has read a frame's announced length into `length` when `recv_length()`
returns, before it reads the payload. verify() plays both on a buffer of its own and fails where they do not hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import websocket

# The whole market's minute in one frame is 2.5 MB. What is larger is no frame of this feed, and would fill memory.
MAX_FRAME_BYTES = 8 * 1024 * 1024

_BUFFER_BYTES = 256 * 1024


class FrameTooLarge(Exception):
    """The server announced a frame that this feed cannot have."""


class UnsupportedLibrary(Exception):
    """The installed websocket-client is not one that this module fits."""


def install(socket: websocket.WebSocket, before_receiving: Callable[[], None]) -> None:
    """Makes a socket refuse frames above MAX_FRAME_BYTES and receive up to 256 KiB at once.

    before_receiving: called whenever the system is about to be asked for more. Reading then raises FrameTooLarge.
    """
    _bound(socket.frame_buffer)
    _read_ahead(socket.frame_buffer, before_receiving)


def verify() -> None:
    """Raises UnsupportedLibrary where install() would not do what it promises."""
    try:
        fits = _received(b"\x82\x03abc\x82\x00") == [b"abc", b""] and _refuses(b"\x82\x7f" + bytes([0, 0, 1] + [0] * 5))
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


def _bound(buffer: Any) -> None:
    """Refuses a frame by its announced length, before its payload is read into memory."""
    read_length = buffer.recv_length

    def recv_length() -> None:
        read_length()
        if buffer.length > MAX_FRAME_BYTES:
            raise FrameTooLarge(f"the server announced a frame of {buffer.length} bytes, above {MAX_FRAME_BYTES}")

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
    except FrameTooLarge:
        return True
    return False
