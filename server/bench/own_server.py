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
from typing import NoReturn, Self

import httpx

from server.config_sources import environment_variable

_START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.01
# The server goes with the benchmark, however that ends.
_PROGRAM = (
    "import sys; from server.launch import follow_parent; follow_parent(int(sys.argv[1])); "
    "from server.cli import main; sys.exit(main(sys.argv[2:]))"
)
# All requests of a load may come at once.
_NO_LIMITS = ("--max-queued-requests", str(10**6), "--max-queued-tokens", str(10**12))
# They would have it listen elsewhere.
_FLAGS_OF_ADDRESSES = ("--uds", "--ssl-certfile", "--ssl-keyfile")


class OwnServerError(Exception):
    """The server does not start; the message ends with what it said."""


class OwnServer:
    """Runs from ``with`` to the end of the block, on a free port of this machine.

    Attributes:
        url: where it listens.
        headers: with the key.
        ready_seconds: from the start of its process to the first 200 of /health/ready.
    """

    def __init__(self, flags: Sequence[str], api_key: str | None = None) -> None:
        """
        Args:
            flags: of ``inflightd serve``, its model among them. Its line is endless unless they bound it.
            api_key: one of the server's keys, if it has any.

        Raises:
            OwnServerError: flags that it cannot have.
        """
        for flag in flags:
            if flag.partition("=")[0] in _FLAGS_OF_ADDRESSES:
                raise OwnServerError(
                    f"a server that is started for a benchmark takes no {flag.split('=')[0]}"
                )
        self._flags = flags
        self.headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = f"http://127.0.0.1:{_free_port()}"
        self.ready_seconds = 0.0

    def __enter__(self) -> Self:
        """Raises OwnServerError."""
        self._sigterm = signal.signal(signal.SIGTERM, _end)
        self._log = tempfile.TemporaryFile()
        port = self.url.rpartition(":")[2]
        command = [sys.executable, "-c", _PROGRAM, str(os.getpid()), "serve", *_NO_LIMITS, *self._flags]
        elsewhere = [environment_variable(flag[2:].replace("-", "_")) for flag in _FLAGS_OF_ADDRESSES]
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", port],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in os.environ.items() if name not in elsewhere},
        )
        try:
            with httpx.Client(base_url=self.url, timeout=5.0, headers=self.headers) as client:
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
        signal.signal(signal.SIGTERM, self._sigterm)

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
    """Raises OwnServerError if it lets nobody in."""
    try:
        status = client.get("/health/ready").status_code
    except httpx.TransportError:
        return False
    if status == 401:
        raise OwnServerError("the server wants an API key: give it one of its keys by --api-key as well")
    return status == 200


def _end(signal_number: int, frame: object) -> NoReturn:
    sys.exit(128 + signal_number)


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
