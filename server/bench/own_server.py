"""A server that a benchmark starts for itself: ``inflightd serve`` in processes of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import httpx

_START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.01


class OwnServerError(Exception):
    """The server does not start; the message ends with what it said."""


class OwnServer:
    """Runs from ``with`` to the end of the block, on a free port of this machine.

    Attributes:
        url: where it listens.
        ready_seconds: from the start of its process to the first 200 of /health/ready.
    """

    def __init__(self, flags: Sequence[str]) -> None:
        """
        Args:
            flags: of ``inflightd serve``, its model among them.
        """
        self._flags = flags
        self.url = f"http://127.0.0.1:{_free_port()}"
        self.ready_seconds = 0.0

    def __enter__(self) -> Self:
        """Raises OwnServerError."""
        self._log = tempfile.TemporaryFile()
        port = self.url.rpartition(":")[2]
        command = [sys.executable, "-m", "server.cli", "serve", *self._flags]
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", port],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            with httpx.Client(base_url=self.url, timeout=5.0) as client:
                while not _is_ready(client):
                    if self._process.poll() is not None:
                        raise OwnServerError(f"the server ended:\n{self._said()}")
                    if time.perf_counter() > began + _START_TIMEOUT_S:
                        raise OwnServerError(f"the server is not ready yet:\n{self._said()}")
                    time.sleep(_POLL_S)
            self.ready_seconds = time.perf_counter() - began
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def resident_bytes(self) -> int:
        """Of all its processes together; memory that they share counts in each. 0 where nothing tells."""
        total = 0
        for pid in _family(self._process.pid):
            with contextlib.suppress(OSError):
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                total += pages * os.sysconf("SC_PAGE_SIZE")
        return total

    def _said(self) -> str:
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-12:])


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def _family(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
