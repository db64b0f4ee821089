"""What an operator asks of a running engine, and its replies."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from scheduler.messages import ProfileSteps, StepPhase, StepProfile
from server.errors import EngineDeadError, ProfileRunningError
from server.transport import Kind

# The engine looks for messages between two steps. One that takes longer than this is the watchdog's affair.
_REPLY_S = 30.0
T = TypeVar("T")


class EngineCommands:
    """Commands on their way to the engine of this moment; its end ends them.

    Args:
        send: hands a message to the engine. Raises EngineDeadError if there is none.
    """

    def __init__(self, send: Callable[[Kind, object], None]) -> None:
        self._send = send
        self._flushes: deque[asyncio.Future[int]] = deque()  # answered in this order
        self._profiles: dict[int, asyncio.Future[tuple[StepPhase, ...]]] = {}

    async def flush_prefix_cache(self) -> int:
        """Returns the number of blocks whose contents were forgotten. Raises EngineDeadError."""
        self._send(Kind.FLUSH, None)
        reply: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._flushes.append(reply)
        return await _within(_REPLY_S, reply)

    async def profile(self, num_steps: int, seconds: float) -> tuple[StepPhase, ...]:
        """The phases of the next steps, or of those that there are within so many seconds.

        Raises:
            EngineDeadError: the engine is not there, or ends meanwhile.
            ProfileRunningError: one is being taken.
        """
        if self._profiles:
            raise ProfileRunningError
        number = secrets.randbits(63)  # each API process hears of the profiles of all
        self._send(Kind.PROFILE, ProfileSteps(number, num_steps))
        reply = self._profiles[number] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait((reply,), timeout=seconds)
            if not reply.done():
                self._send(Kind.PROFILE, ProfileSteps(number, 0))
            return await _within(_REPLY_S, reply)
        finally:
            del self._profiles[number]
            if not reply.done() or reply.cancelled():  # whoever asked is gone
                with contextlib.suppress(EngineDeadError):
                    self._send(Kind.PROFILE, ProfileSteps(number, 0))

    def flushed(self, num_blocks: int) -> None:
        """The engine's reply to the oldest flush."""
        if self._flushes and not (reply := self._flushes.popleft()).done():
            reply.set_result(num_blocks)

    def profiled(self, profile: StepProfile) -> None:
        reply = self._profiles.get(profile.profile_id)
        if reply is not None and not reply.done():
            reply.set_result(profile.phases)

    def fail(self, reason: str) -> None:
        """The engine has ended."""
        error = EngineDeadError(reason)
        for flush in self._flushes:
            _fail(flush, error)
        for profile in self._profiles.values():
            _fail(profile, error)
        self._flushes.clear()


def _fail(reply: asyncio.Future[T], error: EngineDeadError) -> None:
    if not reply.done():
        reply.set_exception(error)


async def _within(seconds: float, reply: asyncio.Future[T]) -> T:
    try:
        async with asyncio.timeout(seconds):
            return await reply
    except TimeoutError:
        raise EngineDeadError("the engine does not answer") from None
