"""An API process's view of the engine: one stream of outputs a request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import NoReturn

from scheduler.messages import EngineOutput, EngineOutputs, EngineStats, ExecutorSpec, Request, StepPhase
from server.engine_commands import EngineCommands
from server.errors import ApiError, EngineDeadError, InternalError
from server.histogram import STEP_TOKENS_BUCKETS, Histogram
from server.output_stream import OutputStream
from server.transport import ApiEnd, Kind, Progress, Ready, TransportError
from server.watchdog import Watchdog

_log = logging.getLogger(__name__)

_MAX_DEATHS = 2
_WATCH_EVERY_S = 0.5


class EngineStartError(Exception):
    """The engine refused to start; the message is meant for the user."""


class EngineLink:
    """Sends requests to the engine process that runs, and hands out what comes back (implements
    ``server.engine_protocol``). Who starts that process is not its business.

    When an engine has died, the next one gets what was worked on with the tokens so far: greedy and seeded
    streams go on with the tokens that they would have had, and clients see a pause. A request that
    ``_MAX_DEATHS`` engines died with may be what kills them: it ends with an error. An engine whose step
    takes too long is not ready.
    """

    def __init__(self) -> None:
        self._streams: dict[str, OutputStream] = {}
        self._connection: ApiEnd | None = None
        self._spec: ExecutorSpec | None = None
        self._is_ready = False
        self._watchdog = Watchdog()
        self._is_wanted = asyncio.Event()
        self._is_late = False
        self._failure: str | None = None
        self.num_restarts = 0
        self.stats = EngineStats()
        self.step_tokens = Histogram(STEP_TOKENS_BUCKETS)
        self._commands = EngineCommands(self._send)

    @property
    def spec(self) -> ExecutorSpec:
        """What the engine offers. Raises EngineDeadError before the engine was ready for the first time."""
        if self._spec is None:
            raise EngineDeadError(self._failure or "the model is still being loaded")
        return self._spec

    @property
    def is_ready(self) -> bool:
        return self._is_ready and not self._is_late

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
        stream = self._streams[request.request_id] = OutputStream(request)
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

    async def flush_prefix_cache(self) -> int:
        """Has the engine forget all prefixes; returns the number of their blocks. Raises EngineDeadError."""
        return await self._commands.flush_prefix_cache()

    async def profile(self, num_steps: int, seconds: float) -> tuple[StepPhase, ...]:
        """The phases of the next steps, of fewer if they take longer than so many seconds.

        Raises:
            EngineDeadError: the engine is not there, or ends meanwhile.
            ProfileRunningError: one is being taken.
        """
        return await self._commands.profile(num_steps, seconds)

    def _send(self, kind: Kind, body: object) -> None:
        if not self._is_ready or self._connection is None:
            raise EngineDeadError(self._failure or "the engine is not ready")
        self._connection.send(kind, body)

    def _on_progress(self, progress: Progress) -> None:
        """The engine is loading."""

    def _on_ready(self, ready: Ready) -> None:
        """The engine takes requests, and has got those that another one left."""

    @property
    def _has_work(self) -> bool:
        return any(stream.is_submitted for stream in self._streams.values())

    async def _watch(self, on_hung: Callable[[], None]) -> None:
        """Says when the engine does not get on, and calls ``on_hung`` when that goes on, once."""
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
                on_hung()
                return

    async def _read(self, connection: ApiEnd) -> NoReturn:
        """Takes what one engine process says, until it says something wrong or this is cancelled."""
        while True:
            kind, body = await connection.receive()
            if kind is Kind.OUTPUTS:
                self._watchdog.heard()
                self._dispatch(body)
                if body.profile is not None:
                    self._commands.profiled(body.profile)
            elif kind is Kind.FLUSHED:
                self._watchdog.heard()
                self._commands.flushed(body)
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
        self._commands.fail(reason)
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

    def _give_up(self, reason: str) -> None:
        """There will be no other engine."""
        self._failure = reason
        self._fail_streams(EngineDeadError(reason))

    def _fail_streams(self, error: ApiError) -> None:
        for stream in self._streams.values():
            stream.fail(error)
        self.stats = EngineStats()
