"""A real ``inflightd serve`` for the tests: two processes, a real port, the real default model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Self

import httpx


def metric_at(url: str, name: str) -> float:
    """The value of a metric without its prefix, summed over its labels."""
    text = httpx.get(f"{url}/metrics").text
    values = re.findall(rf"^inflightd:{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    assert values, f"{name} is not in /metrics"
    return sum(map(float, values))


class ServerProcess:
    """Started by ``with``; ended by SIGTERM, and by SIGKILL if that takes over 20 s.

    Attributes:
        lines: what it has printed.
        start_seconds: how long it took from its start to the line with its address.
    """

    def __init__(
        self,
        *flags: str,
        environment: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
        program: tuple[str, ...] = ("-m", "server.cli"),
    ) -> None:
        """
        Args:
            flags: of ``serve``.
            prefix: a command that runs the command behind it in its own place, as ``unshare`` does.
            program: what Python runs.
        """
        self._flags = flags
        self._prefix = prefix
        self._program = program
        self._environment = environment or {}
        self.lines: list[str] = []
        self.url = ""
        self.start_seconds = 0.0
        self._has_url = threading.Event()

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [*self._prefix, sys.executable, *self._program, "serve", "--port", "0", *self._flags],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | self._environment,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        began = time.monotonic()
        while not self._has_url.wait(0.05):
            if self.process.poll() is not None or time.monotonic() > began + 90:
                self.__exit__()
                raise RuntimeError("the server did not start:\n" + "\n".join(self.lines))
        self.start_seconds = time.monotonic() - began
        return self

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            found = re.search(r" at (?:\S+ \()?(https?://[^\s)]+)\)? \(ready in", line)
            if found:
                self.url = found[1]
                self._has_url.set()

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()

    @property
    def is_exact(self) -> bool:
        """Whether a text is the same whatever is computed beside it: so on a CPU. A GPU in bfloat16 sums in
        another order for another number of tokens, and the choice between two tokens that are nearly as
        likely may turn."""
        return any(re.match(r"Serving \S+ on cpu ", line) for line in self.lines)

    @property
    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in map(int, children):
            if b"server.launch" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
        raise RuntimeError("the server has no engine process")

    def read(self, name: str) -> str:
        """A file below the ``/proc`` of the API process."""
        return Path(f"/proc/{self.process.pid}/{name}").read_text()

    def metric(self, name: str) -> float:
        return metric_at(self.url, name)

    def wait_until(self, name: str, value: float, seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while (seen := self.metric(name)) != value:
            assert time.monotonic() < deadline, f"{name} is {seen}, not {value}, after {seconds} s"
            time.sleep(0.02)
