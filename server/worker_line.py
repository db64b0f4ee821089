"""What the supervisor and an API worker say to each other, over a socket that the worker is born with.

The socket closes when either of the two is gone, which is how the other one knows.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import msgspec

from scheduler.messages import Vocabulary
from server.config import ServerConfig


class Begin(msgspec.Struct, tag=True, frozen=True):
    """To a worker, first: what to serve, and the name under which it joins the engine."""

    config: ServerConfig
    model_path: str
    name: str


class Serving(msgspec.Struct, tag=True, frozen=True):
    """From a worker: it is about to accept connections. With what the engine has to know of the tokenizer."""

    vocabulary: Vocabulary


class Joined(msgspec.Struct, tag=True, frozen=True):
    """From a worker: the engine at this address takes its requests."""

    address: str


class CannotServe(msgspec.Struct, tag=True, frozen=True):
    """From a worker: it ends, and so will every other one. The reason is meant for the user."""

    reason: str


class EngineUp(msgspec.Struct, tag=True, frozen=True):
    """To a worker: an engine is ready at this address."""

    address: str
    num_restarts: int


class EngineDown(msgspec.Struct, tag=True, frozen=True):
    """To a worker: that engine is gone, and whether another one follows."""

    reason: str
    is_final: bool


class EngineHangs(msgspec.Struct, tag=True, frozen=True):
    """From a worker: nothing is to be expected of the engine any more."""


class Question(msgspec.Struct, tag=True, frozen=True):
    """From a worker, and to all of them, itself included.

    Attributes:
        number: of the asker's; with ``asker`` it tells the question from all others.
    """

    number: int
    asker: str
    subject: str
    argument: str = ""


class Reply(msgspec.Struct, tag=True, frozen=True):
    """From a worker: its answer to a question."""

    number: int
    asker: str
    answer: bytes


class Replies(msgspec.Struct, tag=True, frozen=True):
    """To the asker: all answers that came in time."""

    number: int
    answers: list[bytes]


Message = (
    Begin | Serving | Joined | CannotServe | EngineUp | EngineDown | EngineHangs | Question | Reply | Replies
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Message)
_LENGTH_BYTES = 4


class WorkerLine:
    """One end of the line. Sends at once, receives on the event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, end: socket.socket) -> WorkerLine:
        return cls(*await asyncio.open_unix_connection(sock=end))

    def send(self, message: Message) -> None:
        """Nothing happens if the other side is gone."""
        body = _encoder.encode(message)
        if not self._writer.is_closing():
            self._writer.write(len(body).to_bytes(_LENGTH_BYTES, "little") + body)

    async def receive(self) -> Message | None:
        """The next message; None once the other side is gone."""
        try:
            length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES), "little")
            message: Message = _decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return message

    def close(self) -> None:
        self._writer.close()
