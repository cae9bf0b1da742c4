"""The hook into websocket-client: what it does, and that a library which it does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import websocket

from polygon_pipeline.polygon import frame_buffer
from polygon_pipeline.polygon.frame_buffer import MessageRefused, UnsupportedLibrary, install, verify


class FakeBuffer:
    """It reads small and huge frames as websocket-client 1.9 does."""

    length = 0

    def recv(self, size: int) -> bytes:
        raise NotImplementedError

    def recv_length(self) -> None:
        self.length = announced_length(self)

    def recv_frame(self) -> SimpleNamespace:
        self.recv_length()
        return SimpleNamespace(data=payload(self, self.length))


class WithoutRecvLength:
    """It has no function of its own for a frame's length."""

    def recv(self, size: int) -> bytes:
        raise NotImplementedError

    def recv_frame(self) -> SimpleNamespace:
        return SimpleNamespace(data=payload(self, announced_length(self)))


class PayloadFirst(FakeBuffer):
    """It has read a frame's payload by the time recv_length() returns."""

    def recv_length(self) -> None:
        length = announced_length(self)
        self.data = payload(self, length)
        self.length = length

    def recv_frame(self) -> SimpleNamespace:
        self.recv_length()
        return SimpleNamespace(data=self.data)


class LengthUnused(FakeBuffer):
    """It has recv_length(), and does not use it."""

    def recv_frame(self) -> SimpleNamespace:
        length = announced_length(self)
        return SimpleNamespace(data=payload(self, length) if length < 1000 else b"")


class RecvUnused(FakeBuffer):
    """It does not take the bytes from its recv()."""

    def recv_frame(self) -> SimpleNamespace:
        return SimpleNamespace(data=b"from elsewhere")


def announced_length(buffer: Any) -> int:
    first, length = buffer.recv(2)
    buffer.header = (first >> 7, 0, 0, 0, first & 15, 0, length)
    return int.from_bytes(buffer.recv(8)) if length == 127 else int(length)


def payload(buffer: Any, length: int) -> bytes:
    return bytes(buffer.recv(length)) if length else b""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Any]], None]:
    def use(buffer: type[Any]) -> None:
        monkeypatch.setattr(websocket, "WebSocket", lambda **_: SimpleNamespace(frame_buffer=buffer()))

    return use


def test_the_installed_library_fits() -> None:
    verify()


def test_a_library_that_reads_as_the_installed_one_fits(fake: Callable[[type[Any]], None]) -> None:
    fake(FakeBuffer)
    verify()


@pytest.mark.parametrize("buffer", [WithoutRecvLength, PayloadFirst, LengthUnused, RecvUnused])
def test_another_library_is_refused_with_the_version_to_install(
    buffer: type[Any], fake: Callable[[type[Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(buffer)
    monkeypatch.setattr(websocket, "__version__", "9.8.7")
    with pytest.raises(
        UnsupportedLibrary, match=r"websocket-client 9\.8\.7 .*pip install 'websocket-client>=1\.9,<1\.10'"
    ):
        verify()


def received(content: bytes, pieces: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[bytes], list[int], int]:
    """The two frames in the content, the sizes that the system was asked for, and how often it was announced."""
    monkeypatch.setattr(frame_buffer, "MAX_MESSAGE_BYTES", 1000)
    socket = websocket.WebSocket(skip_utf8_validation=True)
    size = -(-len(content) // pieces)
    waiting = [content[start : start + size] for start in range(0, len(content), size)]
    asked: list[int] = []
    announced: list[Any] = []

    def receive(size: int) -> bytes:
        asked.append(size)
        return waiting.pop(0)

    socket.frame_buffer.recv = receive
    install(socket, lambda: announced.append(None))
    return [socket.frame_buffer.recv_frame().data for _ in range(2)], asked, len(announced)


@pytest.mark.parametrize("pieces", [1, 2, 3, 11])
def test_what_has_arrived_is_read_at_once_in_any_division_into_pieces(
    pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames, asked, announced = received(b"\x82\x03abc\x82\x04wxyz", pieces, monkeypatch)
    assert frames == [b"abc", b"wxyz"]
    assert len(asked) == announced == pieces
    assert set(asked) == {256 * 1024}


def test_a_frame_is_refused_by_the_length_it_announces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = b"\x82\x7e" + (1000).to_bytes(2) + bytes(1000)
    frames, _, _ = received(whole + b"\x82\x00", 1, monkeypatch)
    assert [len(frame) for frame in frames] == [1000, 0]
    with pytest.raises(MessageRefused, match="1001 bytes, above 1000"):
        received(b"\x82\x7e" + (1001).to_bytes(2), 1, monkeypatch)


def test_a_message_is_refused_by_what_its_frames_announce_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    part = b"\x7e" + (500).to_bytes(2) + bytes(500)
    frames, _, _ = received(b"\x02" + part + b"\x80" + part, 1, monkeypatch)
    assert [len(frame) for frame in frames] == [500, 500]
    with pytest.raises(MessageRefused, match="1001 bytes, above 1000"):
        received(b"\x02" + part + b"\x00\x7e" + (501).to_bytes(2), 1, monkeypatch)
