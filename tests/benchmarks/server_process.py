"""Starting and stopping one server, and what Linux tells of its processes."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class ServerError(Exception):
    """A server that does not start or does not answer; the message ends with the last lines of its log."""


@dataclass(frozen=True, slots=True)
class Server:
    """How to start a server. ``{port}`` in the command stands for the port.

    Attributes:
        ready_path: answers 200 once requests are served.
        body: fields that its requests carry beyond the common ones.
        setting: what the tables say of its configuration.
    """

    name: str
    version: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_path: str = "/health"
    body: Mapping[str, object] = field(default_factory=dict)
    setting: str = ""


class ServerProcess:
    """A running server on a free port of 127.0.0.1. As a context manager it ends the server and its children.

    Attributes:
        model: the first id of its /v1/models.
        seconds_to_first_answer: from the start of the process to the end of a completion of one token.
    """

    def __init__(
        self, server: Server, log_path: Path, start_timeout: float = 300.0, api_key: str | None = None
    ) -> None:
        self._log_path = log_path
        self._api_key = api_key
        self._server = server
        self.port = _free_port()
        command = [part.replace("{port}", str(self.port)) for part in server.command]
        started = time.perf_counter()
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **server.environment},
                start_new_session=True,  # its processes are those of this session
            )
        try:
            self._wait_until_ready(started + start_timeout)
            self.model: str = self.request("GET", "/v1/models")["data"][0]["id"]
            body = {"model": self.model, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
            self.request("POST", "/v1/completions", body)
        except BaseException:
            self.stop()
            raise
        self.seconds_to_first_answer = time.perf_counter() - started

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_until_ready(self, deadline: float) -> None:
        while True:
            try:
                self.request("GET", self._server.ready_path, timeout=5.0, parse=False)
                return
            except (OSError, http.client.HTTPException, ServerError) as error:
                if self._process.poll() is not None:
                    message = f"{self._server.name} ended with status {self._process.returncode}"
                    raise ServerError(f"{message}:\n{self._log_tail()}") from error
                if time.perf_counter() > deadline:
                    message = f"{self._server.name} did not become ready ({error})"
                    raise ServerError(f"{message}:\n{self._log_tail()}") from error
            time.sleep(0.02)

    def request(
        self, method: str, path: str, body: object = None, *, timeout: float = 60.0, parse: bool = True
    ) -> dict[str, Any]:
        """One request without streaming; the parsed body of a 200.

        Raises:
            ServerError: another status.
            OSError, HTTPException: no answer.
        """
        answer = self._fetch(method, path, body, timeout)
        parsed: dict[str, Any] = json.loads(answer) if parse else {}
        return parsed

    def metric(self, name: str) -> float:
        """The value of a metric without its prefix, summed over its labels; 0 if there is none."""
        page = self._fetch("GET", "/metrics", None, 60.0).decode()
        return sum(map(float, re.findall(rf"^\w+:{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE)))

    def _fetch(self, method: str, path: str, body: object, timeout: float) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            content = None if body is None else json.dumps(body)
            headers = {"Content-Type": "application/json"}
            if self._api_key is not None:
                headers["Authorization"] = f"Bearer {self._api_key}"
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise ServerError(f"{self._server.name}: {path} answered {response.status}: {answer[:300]!r}")
        return answer

    def stop(self) -> None:
        """Asks the server to end, and ends what is left of its session after 20 s."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pid, _ in self._processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def cpu_seconds(self) -> float:
        """CPU seconds, user and system, of all its processes so far."""
        return sum(sum(map(int, stat[11:15])) for _, stat in self._processes()) / CLOCK_TICKS

    def times(self) -> dict[str, tuple[float, float]]:
        """Seconds of CPU and seconds of waiting for a core, of all threads of its processes: the one that was
        started is ``api``, the others are ``engine``."""
        totals = {"api": (0.0, 0.0), "engine": (0.0, 0.0)}
        for pid, _ in self._processes():
            part = "api" if pid == self._process.pid else "engine"
            for thread in Path(f"/proc/{pid}/task").iterdir():
                ran, waited, _ = map(int, (thread / "schedstat").read_text().split())
                cpu, waiting = totals[part]
                totals[part] = (cpu + ran / 1e9, waiting + waited / 1e9)
        return totals

    def peak_memory(self) -> int:
        """Bytes: the sum of its processes' peak resident sets; memory that they share counts in each."""
        total = 0
        for pid, _ in self._processes():
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            total += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
        return total * 1024

    def _processes(self) -> Iterator[tuple[int, list[str]]]:
        """(pid, fields of /proc/pid/stat from the state on) of every process of the server's session."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(stat[3]) == self._process.pid:
                yield int(entry.name), stat

    def _log_tail(self) -> str:
        return "\n".join(self._log_path.read_text(errors="replace").splitlines()[-15:])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def machine_cpu_seconds() -> float:
    """CPU seconds that all processes of the machine together have used, idle and waiting time excluded."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / CLOCK_TICKS
