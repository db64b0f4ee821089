"""The API processes of one server: what one of them has to ask of all."""

from __future__ import annotations

import asyncio
import itertools
from typing import Literal, Protocol

from server.worker_line import Question, Replies, WorkerLine

Subject = Literal["metrics", "is_running", "cancel", "idempotency"]

# Somewhat more than the supervisor waits for those it asks.
_PATIENCE_S = 3.0


class Peers(Protocol):
    """All API processes of this server."""

    @property
    def exist(self) -> bool:
        """Whether there are others than this one, which alone need not be asked."""
        ...

    async def ask(self, subject: Subject, argument: str = "") -> list[bytes]:
        """The answers of all that answer in time, this one's among them; none if the supervisor is silent."""
        ...


class NoPeers:
    """This is the only API process."""

    exist = False

    async def ask(self, subject: Subject, argument: str = "") -> list[bytes]:
        return []


class WorkerPeers:
    """The workers of a supervisor, reached through it."""

    exist = True

    def __init__(self, line: WorkerLine, name: str) -> None:
        self._line = line
        self._name = name
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[list[bytes]]] = {}

    async def ask(self, subject: Subject, argument: str = "") -> list[bytes]:
        number = next(self._numbers)
        waiting: asyncio.Future[list[bytes]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = waiting
        self._line.send(Question(number, self._name, subject, argument))
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await waiting
        except TimeoutError:
            return []
        finally:
            del self._waiting[number]

    def take(self, replies: Replies) -> None:
        """The supervisor's answer to a question of this process."""
        waiting = self._waiting.get(replies.number)
        if waiting is not None and not waiting.done():
            waiting.set_result(replies.answers)
