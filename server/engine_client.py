"""The API process's view of the engine: starts it, keeps it alive, and hands out one stream a request."""

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
from collections.abc import AsyncGenerator, Callable
from typing import NoReturn

from scheduler.messages import (
    EngineOutput,
    EngineOutputs,
    EngineStats,
    ExecutorSpec,
    Request,
    Vocabulary,
)
from server.config import ServerConfig
from server.errors import ApiError, EngineDeadError, InternalError
from server.histogram import STEP_TOKENS_BUCKETS, Histogram
from server.transport import ApiEnd, Kind, Progress, Ready, Start, TransportError, private_address
from server.watchdog import Watchdog

_log = logging.getLogger(__name__)

# An engine that ends this often within the time will end again: give up and say so.
_MAX_RESTARTS = 3
_RESTART_WINDOW_S = 120.0
_QUIT_GRACE_S = 5.0
_MAX_DEATHS = 2
_RETRY_S = 0.5
_WATCH_EVERY_S = 0.5
# glibc asks the kernel for huge pages: a decode step on a CPU reads all weights, and spends a tenth less.
_ENGINE_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class EngineStartError(Exception):
    """The engine refused to start; the message is meant for the user."""


class _Stream:
    """Outputs of one request on their way to its consumer. Those that pile up are handed over as one.

    Attributes:
        is_submitted: whether the engine that runs now has the request, which has not ended.
        has_ended: whether the last output has come.
        num_deaths: engines that died with it.
    """

    __slots__ = ("_failure", "_num_cached_tokens", "_pending", "_request", "_token_ids", "_waiter",
                 "has_ended", "is_submitted", "num_deaths")  # fmt: skip

    def __init__(self, request: Request) -> None:
        self._request = request
        self._token_ids: list[int] = []
        self._num_cached_tokens: int | None = None
        self._pending: list[EngineOutput] = []
        self._failure: ApiError | None = None
        # One consumer, woken once: an Event does more for each token.
        self._waiter: asyncio.Future[None] | None = None
        self.is_submitted = True
        self.has_ended = False
        self.num_deaths = 0

    def put(self, output: EngineOutput) -> None:
        if output.token_ids and self._num_cached_tokens is None:
            self._num_cached_tokens = output.num_cached_tokens
        if self.num_deaths:  # what a later engine finds in its cache is not what the client's prompt found
            output = dataclasses.replace(output, num_cached_tokens=self._num_cached_tokens or 0)
        self._token_ids += output.token_ids
        self._pending.append(output)
        if output.finish_reason is not None:
            self.is_submitted = False
            self.has_ended = True
        self._wake()

    @property
    def has_failed(self) -> bool:
        return self._failure is not None

    def fail(self, error: ApiError) -> None:
        """Nothing comes any more."""
        self._failure = error
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def remaining_request(self) -> Request:
        """What another engine has to do."""
        known = self._request.generated_token_ids  # another server's engine generated them
        return dataclasses.replace(self._request, generated_token_ids=(*known, *self._token_ids))

    async def get(self) -> EngineOutput:
        """Raises the failure of the stream once what came before it is handed over."""
        if not self._pending and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        pending, self._pending = self._pending, []
        if not pending:
            assert self._failure is not None
            raise self._failure
        return pending[0] if len(pending) == 1 else _joined(pending)


def _joined(outputs: list[EngineOutput]) -> EngineOutput:
    first, last = outputs[0], outputs[-1]
    logprobs = [record for output in outputs for record in output.logprobs or ()]
    prompt_logprobs = next((o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None), None)
    return EngineOutput(
        request_id=first.request_id,
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        logprobs=tuple(logprobs) if any(o.logprobs is not None for o in outputs) else None,
        prompt_logprobs=prompt_logprobs,
        embedding=next((o.embedding for o in outputs if o.embedding is not None), None),
        finish_reason=last.finish_reason,
        num_cached_tokens=first.num_cached_tokens,
        first_scheduled_time=first.first_scheduled_time,
        error=last.error,
    )


class ZmqEngineClient:
    """Runs one engine process and talks to it over ZeroMQ (implements ``server.engine_protocol``).

    An engine that dies is started again at once, and gets what it was working on with the tokens so far:
    greedy and seeded streams go on with the tokens that they would have had, and clients see a pause. A
    request that ``_MAX_DEATHS`` engines died with may be what kills them: it ends with an error. An engine
    whose step takes too long is not ready, and ended if that goes on.

    Args:
        module: what the engine process runs; it gets the address of the line and our process id.
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
        on_failure: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._start_message = Start(config, model_path)
        self._module = module
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._streams: dict[str, _Stream] = {}
        self._connection: ApiEnd | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._spec: ExecutorSpec | None = None
        self._vocabulary: Vocabulary | None = None
        self._is_ready = False
        self._watchdog = Watchdog()
        self._is_wanted = asyncio.Event()
        self._is_late = False
        self._failure: str | None = None
        self.num_restarts = 0
        self.stats = EngineStats()
        self.step_tokens = Histogram(STEP_TOKENS_BUCKETS)

    @property
    def spec(self) -> ExecutorSpec:
        """What the engine offers. Raises EngineDeadError before the engine was ready for the first time."""
        if self._spec is None:
            raise EngineDeadError(self._failure or "the model is still being loaded")
        return self._spec

    @property
    def is_ready(self) -> bool:
        return self._is_ready and not self._is_late

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

    async def generate(self, request: Request) -> AsyncGenerator[EngineOutput, None]:
        """Outputs of a request until one has a finish reason. Closing the iterator aborts the request.

        Raises:
            EngineDeadError: the engine is not running, or was given up meanwhile.
            InternalError: engines died with this request.
        """
        if not self._is_ready or self._connection is None:
            raise EngineDeadError(self._failure or "the engine is not ready")
        if not self._has_work:
            self._watchdog.started_work()
        self._is_wanted.set()
        stream = self._streams[request.request_id] = _Stream(request)
        is_finished = False
        try:
            self._connection.send(Kind.REQUEST, request)
            while not is_finished:
                output = await stream.get()
                is_finished = output.finish_reason is not None
                yield output
        finally:
            # The same id may not be taken by somebody else: the front end makes ids, never the client.
            self._streams.pop(request.request_id, None)
            if not is_finished:
                self.abort(request.request_id)

    def abort(self, request_id: str) -> None:
        """Ends a request in the engine; one that has ended already is no error."""
        if self._is_ready and self._connection is not None:
            self._connection.send(Kind.ABORT, request_id)

    def fail(self, request_id: str, error: ApiError) -> None:
        """Ends a request and its stream with an error; one that has ended already is no error."""
        stream = self._streams.get(request_id)
        if stream is not None and not (stream.has_ended or stream.has_failed):
            stream.fail(error)

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
            now = time.monotonic()
            died_too_often = len(ends) == _MAX_RESTARTS and now - ends[0] < _RESTART_WINDOW_S
            if self._spec is None or died_too_often:
                self._failure = reason
                self._fail_streams(EngineDeadError(reason))
                self._on_failure(reason)
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
            self._connection = connection
            reader = asyncio.create_task(self._read(connection))
            exited = asyncio.create_task(process.wait())
            watching = asyncio.create_task(self._watch(process))
            try:
                connection.send(Kind.START, self._start_message)
                connection.send(Kind.JOIN)
                if self._vocabulary is not None:
                    connection.send(Kind.VOCABULARY, self._vocabulary)
                await asyncio.wait((reader, exited), return_when=asyncio.FIRST_COMPLETED)
                self._is_ready = False
                # What the engine still had to say is in the socket: let it be read.
                await asyncio.wait((reader,), timeout=0.5)
                if watching.done():
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

    @property
    def _has_work(self) -> bool:
        return any(stream.is_submitted for stream in self._streams.values())

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Ends an engine that does not get on."""
        while True:
            if not self._has_work:  # so that an idle server sleeps
                self._is_wanted.clear()
                await self._is_wanted.wait()
            await asyncio.sleep(_WATCH_EVERY_S)
            has_work = self._is_ready and self._has_work
            is_late = self._watchdog.is_late(has_work)
            if is_late != self._is_late:
                self._is_late = is_late
                _log.warning("the engine %s", "does not get on" if is_late else "gets on again")
            if self._watchdog.is_hung(has_work):
                process.kill()
                return

    async def _read(self, connection: ApiEnd) -> NoReturn:
        while True:
            kind, body = await connection.receive()
            if kind is Kind.OUTPUTS:
                self._watchdog.heard()
                self._dispatch(body)
            elif kind is Kind.PROGRESS:
                self._on_progress(body)
            elif kind is Kind.READY:
                self._spec = body.spec
                self._is_ready = True
                self._watchdog.started_work()
                self._is_wanted.set()
                self._resume_streams(connection)
                self._on_ready(body)
            elif kind is Kind.FAILED:
                raise EngineStartError(body)
            else:
                raise TransportError(f"an API process does not take {kind.name}")

    def _dispatch(self, message: EngineOutputs) -> None:
        # Each message is of one call of ``EngineCore.step``, which hands over one step at most.
        num_tokens = message.stats.scheduled_tokens_total - self.stats.scheduled_tokens_total
        if num_tokens:
            self.step_tokens.observe(num_tokens)
        self.stats = message.stats
        for output in message.outputs:
            # A stream that was closed has gone; its last outputs may still be on their way.
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put(output)

    def _keep_streams(self, reason: str) -> None:
        """After the engine's end: keeps streams for the next one, but for those that may have caused it."""
        for request_id, stream in self._streams.items():
            stream.num_deaths += stream.is_submitted
            stream.is_submitted = False
            if stream.num_deaths >= _MAX_DEATHS:
                _log.error("request %s: %d engines died with it (%s)", request_id, stream.num_deaths, reason)
                stream.fail(InternalError())
        self.stats = EngineStats()

    def _resume_streams(self, connection: ApiEnd) -> None:
        for stream in self._streams.values():
            if not (stream.is_submitted or stream.has_ended or stream.has_failed):
                stream.is_submitted = True
                connection.send(Kind.REQUEST, stream.remaining_request())

    def _fail_streams(self, error: ApiError) -> None:
        for stream in self._streams.values():
            stream.fail(error)
        self.stats = EngineStats()


def _described_exit(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-code).name}"
    return f"exit status {code}"
