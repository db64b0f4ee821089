"""Which API process gets which of the engine's outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from scheduler.messages import EngineOutput, EngineOutputs


class OutputRoutes:
    """The API processes behind one engine, and whose each request is.

    Every one of them hears of every step, so that it knows how the engine is and that it gets on.
    """

    def __init__(self) -> None:
        self._members: list[bytes] = []
        self._owners: dict[str, bytes] = {}

    def join(self, member: bytes) -> None:
        if member not in self._members:
            self._members.append(member)

    def leave(self, member: bytes) -> list[str]:
        """Forgets a process. Returns the ids of its requests that are not finished."""
        if member in self._members:
            self._members.remove(member)
        left = [request_id for request_id, owner in self._owners.items() if owner == member]
        for request_id in left:
            del self._owners[request_id]
        return left

    def add(self, request_id: str, owner: bytes) -> None:
        self._owners[request_id] = owner

    def split(self, message: EngineOutputs) -> Iterator[tuple[bytes, EngineOutputs]]:
        """What a step produced as one message a process. What nobody owns any more is left out."""
        if len(self._members) == 1:
            self._forget_finished(message.outputs)
            yield self._members[0], message
            return
        shares: dict[bytes, list[EngineOutput]] = {member: [] for member in self._members}
        for output in message.outputs:
            owner = self._owners.get(output.request_id)
            if owner in shares:
                shares[owner].append(output)
        self._forget_finished(message.outputs)
        for member, outputs in shares.items():
            yield member, EngineOutputs(tuple(outputs), message.stats, message.profile)

    def _forget_finished(self, outputs: Iterable[EngineOutput]) -> None:
        for output in outputs:
            if output.finish_reason is not None:
                self._owners.pop(output.request_id, None)
