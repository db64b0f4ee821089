"""Responses that can be asked for again, or gone on from."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

_MAX_RESPONSES = 10_000
_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and all that led to it.

    Attributes:
        owner: the name of the key that made it, who alone may see it; empty if all keys share all.
        body: the response as JSON.
        items: what it answers, earlier responses with their own items included, as a JSON list.
    """

    id: str
    owner: str
    body: bytes
    items: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.body) + len(self.items)


class ResponseStore(Protocol):
    """Keeps responses up to some bound, and forgets the oldest beyond it."""

    async def put(self, response: StoredResponse) -> None:
        """Keeps a response, in place of one with the same id."""
        ...

    async def get(self, response_id: str, owner: str) -> StoredResponse | None: ...

    async def delete(self, response_id: str, owner: str) -> bool:
        """Whether there was one."""
        ...

    def close(self) -> None: ...


class ResponseMemory:
    """Responses in this process, gone when it ends. What nobody has asked for longest goes first."""

    def __init__(self, max_responses: int = _MAX_RESPONSES, max_bytes: int = _MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._num_bytes = 0

    async def put(self, response: StoredResponse) -> None:
        self._forget(response.id)
        self._responses[response.id] = response
        self._num_bytes += response.num_bytes
        while len(self._responses) > self._max_responses or self._num_bytes > self._max_bytes:
            self._forget(next(iter(self._responses)))

    async def get(self, response_id: str, owner: str) -> StoredResponse | None:
        response = self._responses.get(response_id)
        if response is None or response.owner != owner:
            return None
        self._responses.move_to_end(response_id)
        return response

    async def delete(self, response_id: str, owner: str) -> bool:
        if await self.get(response_id, owner) is None:
            return False
        self._forget(response_id)
        return True

    def close(self) -> None:
        self._responses.clear()
        self._num_bytes = 0

    def _forget(self, response_id: str) -> None:
        response = self._responses.pop(response_id, None)
        if response is not None:
            self._num_bytes -= response.num_bytes
