"""Responses that are worked on while nobody waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from server.errors import TooManyRequestsError

_MAX_RUNNING = 256


class BackgroundResponses:
    """The tasks of running responses, by their ids.

    A client that asks for a response in the background holds no connection, so that nothing but
    ``max_running`` bounds how many there are.
    """

    def __init__(self, max_running: int = _MAX_RUNNING) -> None:
        self._max_running = max_running
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.is_closing = False

    def check_room(self) -> None:
        """Raises TooManyRequestsError if no further response may be started."""
        if len(self._tasks) >= self._max_running:
            raise TooManyRequestsError(
                f"{self._max_running} responses are running in the background. Wait until one is complete."
            )

    def start(self, response_id: str, work: Coroutine[Any, Any, None]) -> None:
        """Runs ``work``, which stores what becomes of the response, also if it is cancelled."""
        task = asyncio.create_task(work)
        self._tasks[response_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(response_id, None))

    def is_running(self, response_id: str) -> bool:
        return response_id in self._tasks

    async def cancel(self, response_id: str) -> None:
        """Ends a response and waits until it is stored as such. Nothing happens if it is complete."""
        task = self._tasks.get(response_id)
        if task is not None:
            task.cancel()
            await asyncio.wait((task,))

    async def close(self) -> None:
        """Ends all of them, as failed."""
        self.is_closing = True
        for response_id in list(self._tasks):
            await self.cancel(response_id)
