"""Machines that are none: each has processes, a network and a host name of its own, by the kernel's namespaces.

Belongs here: starting a machine, running something on it, cutting it off and losing it. Does not belong here: what
runs there (cluster).

What looks at process ids or at addresses "of this machine" sees what it would see on a machine of its own. The disk is
shared, so each machine has a folder of its own. Needs root, in a network namespace that may be changed: `make cluster`
makes one, and nothing of it is left at the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from polygon_pipeline_tests.support.waiting import until

NETWORK = "10.213.0"
# The servers that all machines use, each with an address, so that a machine can be cut off from one of them alone.
EXCHANGE, S3, REDIS, POSTGRES, VOLUME = (f"{NETWORK}.{number}" for number in (2, 3, 4, 5, 6))

_BRIDGE = "cluster0"
_SWITCHS = "02:00:00:00:00:01"
_NOBODYS = "02:00:00:00:00:ff"  # the address of no network card


def make_network() -> None:
    """The network of the machines, with the servers' addresses on the side of this process."""
    _ip("link", "set", "lo", "up")
    # Without an address of its own it has the lowest of its machines', and a new one when that machine is lost: the
    # others would send into nothing for up to 75 s.
    _ip("link", "add", _BRIDGE, "address", _SWITCHS, "type", "bridge")
    for address in (f"{NETWORK}.1", EXCHANGE, S3, REDIS, POSTGRES, VOLUME):
        _ip("address", "add", f"{address}/24", "dev", _BRIDGE)
    _ip("link", "set", _BRIDGE, "up")


def remove_network() -> None:
    with contextlib.suppress(subprocess.CalledProcessError):
        _ip("link", "delete", _BRIDGE)


class Machine:
    """number: of its address, from 10 on. folder: its disk, which outlives it; `tmp` in it is its TMPDIR."""

    def __init__(self, name: str, number: int, folder: Path) -> None:
        self.name = name
        self.address = f"{NETWORK}.{number}"
        self.folder = folder
        self._card = f"card{number}"
        self._first = 0
        self._unshare: subprocess.Popen[bytes] | None = None
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Turns it on; nothing runs there yet."""
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        namespaces = ["--net", "--pid", "--fork", "--uts", "--ipc", "--mount-proc", "--kill-child"]
        first = f"hostname {self.name} && sleep infinity & wait"  # the shell waits for orphans too
        self._unshare = subprocess.Popen(["unshare", *namespaces, "sh", "-c", first], stdin=subprocess.DEVNULL)
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        until(lambda: children.read_text().split(), f"{self.name} is turned on", seconds=10)
        self._first = int(children.read_text())
        _ip("link", "add", self._card, "type", "veth", "peer", "name", "eth0", "netns", str(self._first))
        _ip("link", "set", self._card, "master", _BRIDGE, "up")
        self._inside("address", "add", f"{self.address}/24", "dev", "eth0")
        self._inside("link", "set", "eth0", "up")
        self._inside("link", "set", "lo", "up")

    def run(self, command: Sequence[str], environment: Mapping[str, str], log: str) -> None:
        """Starts something there; what it prints is added to this file of the machine's folder."""
        where = [f"--target={self._first}", f"--wd={self.folder}", "--net", "--pid", "--uts", "--ipc", "--mount"]
        with (self.folder / log).open("ab") as output:
            process = subprocess.Popen(
                ["nsenter", *where, "--", *command],
                env={**environment, "TMPDIR": str(self.folder / "tmp")},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._started.append(process)

    def processes(self, text: str = "") -> list[int]:
        """The processes there whose command has this text, by their ids here."""
        return [pid for pid in _pids() if self._is_here(pid) and text in _command(pid)]

    def has_mounted(self, folder: Path) -> bool:
        return f" {folder} " in Path(f"/proc/{self._first}/mountinfo").read_text()

    def kill(self, text: str) -> None:
        """kill -9 of the processes there whose command has this text."""
        self._signal(text, signal.SIGKILL)

    def end(self, text: str) -> None:
        """Asks them to end, each of them, as systemd does it for a service and tini for a container."""
        self._signal(text, signal.SIGTERM)

    def lose(self) -> None:
        """The whole machine is gone at once, without a word to anybody; its disk stays."""
        if self._unshare is None:
            return
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "delete", self._card)
        os.kill(self._first, signal.SIGKILL)  # the kernel ends all others with it
        for process in (self._unshare, *self._started):
            process.wait(30)
        self._unshare, self._started = None, []

    def cut_off(self, server: str) -> None:
        """From now on nothing that it sends to this server arrives, and nobody says so."""
        self._inside("neighbour", "replace", server, "lladdr", _NOBODYS, "nud", "permanent", "dev", "eth0")

    def join(self, server: str) -> None:
        self._inside("neighbour", "delete", server, "dev", "eth0")

    def _signal(self, text: str, number: signal.Signals) -> None:
        victims = self.processes(text)
        assert victims, f"nothing on {self.name} has {text}"
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _inside(self, *arguments: str) -> None:
        subprocess.run(["nsenter", "--target", str(self._first), "--net", "ip", *arguments], check=True)

    def _is_here(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/{pid}/ns/pid") == os.readlink(f"/proc/{self._first}/ns/pid")
        return False


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""
