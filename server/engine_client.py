"""Runs the engine process: starts it, keeps it alive, and replaces it when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable

from scheduler.messages import Vocabulary
from server.config import ServerConfig
from server.engine_link import EngineLink
from server.errors import EngineDeadError
from server.transport import ApiEnd, Kind, Progress, Ready, Start, private_address

_log = logging.getLogger(__name__)

# An engine that ends this often within the time will end again: give up and say so.
_MAX_RESTARTS = 3
_RESTART_WINDOW_S = 120.0
_QUIT_GRACE_S = 5.0
_RETRY_S = 0.5
# glibc asks the kernel for huge pages: a decode step on a CPU reads all weights, and spends a tenth less.
_ENGINE_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class ZmqEngineClient(EngineLink):
    """The link of the process that runs the engine: an engine that dies is started again at once, and one
    that hangs is ended.

    Args:
        module: what the engine process runs; it gets the address of the line and our process id.
        on_end: an engine process ended, and why; another one is started, or ``on_failure`` follows.
        on_failure: the engine cannot be started, or died too often to be started again.
    """

    def __init__(
        self,
        config: ServerConfig,
        model_path: str,
        *,
        module: str = "server.launch",
        on_progress: Callable[[Progress], None] = lambda progress: None,
        on_ready: Callable[[Ready], None] = lambda ready: None,
        on_end: Callable[[str], None] = lambda reason: None,
        on_failure: Callable[[str], None] = lambda reason: None,
    ) -> None:
        super().__init__()
        self._start_message = Start(config, model_path)
        self._module = module
        self._tell_progress = on_progress
        self._tell_ready = on_ready
        self._tell_end = on_end
        self._tell_failure = on_failure
        self._supervisor: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._is_hung = False
        self._vocabulary: Vocabulary | None = None
        self.address = ""

    def start(self) -> None:
        """Starts the engine process; returns at once."""
        self._supervisor = asyncio.create_task(self._supervise())

    def provide(self, vocabulary: Vocabulary) -> None:
        """What this and every later engine process needs for grammars."""
        self._vocabulary = vocabulary
        if self._connection is not None:
            self._connection.send(Kind.VOCABULARY, vocabulary)

    async def stop(self) -> None:
        """Asks the engine to quit, waits a moment, and ends it if it does not."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._fail_streams(EngineDeadError("the server is shutting down"))

    def set_log_level(self, level: str) -> None:
        """Of this engine and those that come after it."""
        config = dataclasses.replace(self._start_message.config, log_level=level)
        self._start_message = dataclasses.replace(self._start_message, config=config)
        if self._connection is not None and self._is_ready:
            self._connection.send(Kind.LOG_LEVEL, level)

    def forget(self, member: str) -> None:
        """Another process that had joined the engine is gone: its requests end there."""
        if self._is_ready and self._connection is not None:
            self._connection.send(Kind.LEAVE, member)

    def end_hung(self) -> None:
        """Ends an engine that does not get on, so that another one is started."""
        if self._process is not None and self._process.returncode is None:
            self._is_hung = True
            self._process.kill()

    def _on_progress(self, progress: Progress) -> None:
        self._tell_progress(progress)

    def _on_ready(self, ready: Ready) -> None:
        self._tell_ready(ready)

    async def _supervise(self) -> None:
        ends: deque[float] = deque(maxlen=_MAX_RESTARTS)
        while True:
            try:
                reason = await self._run_once()
            except Exception as error:  # no directory for the socket, no process, no file descriptors ...
                reason = f"it cannot be run: {error}"
                await asyncio.sleep(_RETRY_S)
            self._is_ready = False
            self._keep_streams(reason)
            self._tell_end(reason)
            now = time.monotonic()
            died_too_often = len(ends) == _MAX_RESTARTS and now - ends[0] < _RESTART_WINDOW_S
            if self._spec is None or died_too_often:
                self._give_up(reason)
                self._tell_failure(reason)
                return
            ends.append(now)
            self.num_restarts += 1
            _log.error("the engine process ended (%s); starting it again", reason)

    async def _run_once(self) -> str:
        """One life of the engine process, from its start to its end; returns why it ended."""
        with private_address() as address, contextlib.closing(ApiEnd(address)) as connection:
            # The engine is a process of its own so that it may die alone; it follows us if we die first.
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", self._module, address, str(os.getpid()),
                stdin=asyncio.subprocess.DEVNULL, env=_ENGINE_ENVIRONMENT | os.environ,
            )  # fmt: skip
            self._connection, self._process, self.address = connection, process, address
            self._is_hung = False
            reader = asyncio.create_task(self._read(connection))
            exited = asyncio.create_task(process.wait())
            watching = asyncio.create_task(self._watch(self.end_hung))
            try:
                connection.send(Kind.START, self._start_message)
                connection.send(Kind.JOIN)
                if self._vocabulary is not None:
                    connection.send(Kind.VOCABULARY, self._vocabulary)
                await asyncio.wait((reader, exited), return_when=asyncio.FIRST_COMPLETED)
                self._is_ready = False
                # What the engine still had to say is in the socket: let it be read.
                await asyncio.wait((reader,), timeout=0.5)
                if self._is_hung:
                    return "its step took too long"
                return str(reader.exception()) if reader.done() else _described_exit(process.returncode)
            finally:
                self._connection = None
                self._is_late = False
                reader.cancel()
                watching.cancel()
                if process.returncode is None and self._is_ready:  # one that is loading does not listen
                    connection.send(Kind.QUIT)
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(asyncio.shield(exited), _QUIT_GRACE_S)
                if process.returncode is None:
                    process.kill()
                await exited


def _described_exit(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-code).name}"
    return f"exit status {code}"
