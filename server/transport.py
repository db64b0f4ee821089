"""The two ends of the line between an API process and its engine process: ZeroMQ carrying msgpack.

Each message is two frames: one byte that names its kind, then a msgpack body whose type the kind fixes.
The engine binds a unix socket in a directory that only this user may enter, and that whoever started it
removes after it; any number of API processes connect to it, each under a name of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from scheduler.engine_core import EngineCore
from scheduler.messages import EngineOutputs, ExecutorSpec, ProfileSteps, Request, Vocabulary
from server.config import ServerConfig
from server.logs import set_log_level
from server.output_routes import OutputRoutes

_log = logging.getLogger(__name__)

# The check takes 26 ms for 100,000 blocks: when nothing has happened for a while, and not too often.
_CHECK_AFTER_IDLE_MS = 1000
_CHECK_EVERY_S = 10.0
_MAX_MESSAGE_BYTES = 256 * 2**20
_MAX_IGNORED = 1000
_PREFIX, _LOCK = "inflightd-", "lock"
# How often to look for an engine that has not bound its socket yet.
_CONNECT_EVERY_MS = 10


@dataclass(frozen=True, slots=True)
class Start:
    """First message to an engine: what to load."""

    config: ServerConfig
    model_path: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the engine has come with loading, in units of the stage."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine answers from now on."""

    spec: ExecutorSpec
    memory_plan: str
    load_seconds: float


class Kind(bytes, Enum):
    """First frame of a message."""

    START = b"S"
    JOIN = b"J"
    LEAVE = b"L"
    REQUEST = b"A"
    ABORT = b"X"
    QUIT = b"Q"
    VOCABULARY = b"V"
    FLUSH = b"C"
    PROFILE = b"M"
    LOG_LEVEL = b"G"
    PROGRESS = b"P"
    READY = b"R"
    OUTPUTS = b"O"
    FLUSHED = b"D"
    FAILED = b"F"


_BODY_TYPES: dict[Kind, Any] = {
    Kind.START: Start,
    Kind.JOIN: None,
    Kind.LEAVE: str,
    Kind.REQUEST: Request,
    Kind.ABORT: str,
    Kind.QUIT: None,
    Kind.VOCABULARY: Vocabulary,
    Kind.FLUSH: None,
    Kind.PROFILE: ProfileSteps,
    Kind.LOG_LEVEL: str,
    Kind.PROGRESS: Progress,
    Kind.READY: Ready,
    Kind.OUTPUTS: EngineOutputs,
    Kind.FLUSHED: int,
    Kind.FAILED: str,
}
_DECODERS = {kind: msgspec.msgpack.Decoder(body) for kind, body in _BODY_TYPES.items()}
_encoder = msgspec.msgpack.Encoder()


class TransportError(Exception):
    """A message that is none of ours."""


def encode(kind: Kind, body: object = None) -> tuple[bytes, bytes]:
    return kind.value, _encoder.encode(body)


def decode(frames: list[bytes]) -> tuple[Kind, Any]:
    """Raises TransportError for anything that ``encode`` did not make."""
    try:
        name, body = frames
        kind = Kind(name)
        return kind, _DECODERS[kind].decode(body)
    except (ValueError, msgspec.DecodeError) as error:
        raise TransportError(f"bad message between API and engine process: {error}") from error


@contextlib.contextmanager
def private_address() -> Iterator[str]:
    """A ZeroMQ address below a fresh directory of mode 0700, removed afterwards.

    Whoever is killed cannot remove it. So it is locked for as long as its owner lives, and those that nobody
    locks any more are removed here.
    """
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError), lock.open() as file:  # in use, or another user's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
    try:
        unnamed = directory / "unlocked"
        with unnamed.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            unnamed.rename(directory / _LOCK)  # seen by others only when it is locked
            yield f"ipc://{directory / 'engine'}"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class ApiEnd:
    """The API process's end. Sends at once, receives on the event loop.

    Args:
        name: tells this end from all others that the engine ever has.
    """

    def __init__(self, address: str, name: str = "api") -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IDENTITY, name.encode())
        self._socket.setsockopt(zmq.RECONNECT_IVL, _CONNECT_EVERY_MS)
        # Nothing may be dropped or block here: admission bounds what is in flight, not the socket.
        self._socket.set_hwm(0)
        self._socket.connect(address)

    def send(self, kind: Kind, body: object = None) -> None:
        self._socket.send_multipart(encode(kind, body))

    async def receive(self) -> tuple[Kind, Any]:
        return decode(await self._socket.recv_multipart())

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class EngineEnd:
    """The engine process's end: feeds an ``EngineCore`` and sends back what its steps produce.

    Whoever sends START is told of the loading and may say QUIT. Those who JOIN get READY, their share of the
    outputs, and the statistics of every step. Who sends anything else is not listened to any more.
    """

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        self._socket.bind(address)
        self._starter = b""
        self._ignored: set[bytes] = set()
        self._ready: tuple[bytes, bytes] | None = None
        self._routes = OutputRoutes()
        # An event that any thread may raise, to end a wait for a message.
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wakeup, zmq.POLLIN)

    def wake(self) -> None:
        """Has ``run`` look whether there is work. May be called from any thread."""
        os.eventfd_write(self._wakeup, 1)

    def receive(self) -> tuple[Kind, Any]:
        """Waits for the first message; who sent it started this process."""
        while (message := self._receive()) is None:
            pass
        self._starter, kind, body = message
        return kind, body

    def _receive(self) -> tuple[bytes, Kind, Any] | None:
        """The next message; None if it is none of ours, or from somebody who sent such a one."""
        sender, *frames = self._socket.recv_multipart()
        if sender in self._ignored:
            return None
        try:
            return sender, *decode(frames)
        except TransportError as error:
            self._ignore(sender, error)
            return None

    def _ignore(self, sender: bytes, error: TransportError) -> None:
        """Raises the error if the sender is the process that started this one: nothing can go on then."""
        if sender == self._starter:
            raise error
        _log.warning("a stranger on the line is ignored: %s", error)
        if len(self._ignored) >= _MAX_IGNORED:
            self._ignored.clear()
        self._ignored.add(sender)

    def send(self, kind: Kind, body: object = None) -> None:
        """To the process that started this one."""
        frames = encode(kind, body)
        if kind is Kind.READY:
            self._ready = frames
        self._socket.send_multipart((self._starter, *frames))

    def run(
        self,
        core: EngineCore,
        on_vocabulary: Callable[[Vocabulary], None] = lambda vocabulary: None,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        """Steps the core while it has work and sleeps while it has none, until QUIT.

        Args:
            on_idle: called after a while without work.
        """
        next_check = 0.0
        while True:
            if not core.has_work:
                wants_check = time.monotonic() >= next_check
                if not self._wait(_CHECK_AFTER_IDLE_MS if wants_check else None):
                    core.check_invariants()
                    on_idle()
                    next_check = time.monotonic() + _CHECK_EVERY_S
                    self._wait()
            while self._socket.poll(0):
                message = self._receive()
                if message is None:
                    continue
                sender, kind, body = message
                if kind is Kind.QUIT and self._may_command(sender):
                    return
                try:
                    self._take(sender, kind, body, core, on_vocabulary)
                except TransportError as error:
                    self._ignore(sender, error)
            if core.has_work:
                for member, share in self._routes.split(core.step()):
                    self._send_to(member, Kind.OUTPUTS, share)

    def _send_to(self, member: bytes, kind: Kind, body: object) -> None:
        self._socket.send_multipart((member, *encode(kind, body)))

    def _take(
        self,
        sender: bytes,
        kind: Kind,
        body: Any,
        core: EngineCore,
        on_vocabulary: Callable[[Vocabulary], None],
    ) -> None:
        if kind is Kind.REQUEST:
            try:
                core.add_request(body)
            except ValueError as error:
                raise TransportError(str(error)) from None
            self._routes.add(body.request_id, sender)
        elif kind is Kind.ABORT:
            core.abort(body)
        elif kind is Kind.JOIN:
            self._join(sender)
        elif kind is Kind.LEAVE:
            for request_id in self._routes.leave(body.encode()):
                core.abort(request_id)
        elif kind is Kind.VOCABULARY and self._may_command(sender):
            on_vocabulary(body)
        elif kind is Kind.FLUSH and self._may_command(sender):
            self._send_to(sender, Kind.FLUSHED, core.flush_prefix_cache())
        elif kind is Kind.PROFILE and self._may_command(sender):
            core.profile(body)
        elif kind is Kind.LOG_LEVEL and self._may_command(sender):
            set_log_level(body)
        else:
            raise TransportError(f"an engine does not take {kind.name}")

    def _may_command(self, sender: bytes) -> bool:
        return sender == self._starter or not self._starter

    def _join(self, member: bytes) -> None:
        self._routes.join(member)
        if self._ready is not None and member != self._starter:
            self._socket.send_multipart((member, *self._ready))

    def _wait(self, milliseconds: int | None = None) -> bool:
        """Waits for a message or ``wake``; whether one came."""
        ready = dict(self._poller.poll(milliseconds))
        if self._wakeup in ready:
            os.eventfd_read(self._wakeup)
        return bool(ready)

    def close(self) -> None:
        self._socket.close()
        self._context.term()
        os.close(self._wakeup)

    def progress(self) -> Callable[[str, int, int], None]:
        """A callback that reports loading, at most 20 times a second and always the end of a stage."""
        last_sent = 0.0

        def report(stage: str, done: int, total: int) -> None:
            nonlocal last_sent
            now = time.monotonic()
            if done >= total or now - last_sent >= 0.05:
                last_sent = now
                self.send(Kind.PROGRESS, Progress(stage, done, total))

        return report
