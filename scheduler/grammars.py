"""What the step loop asks of grammars: which tokens may come next, and what comes of those that came."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from scheduler.messages import Accepted, Request, ScheduledSequence, TokenMasks


class Grammars(Protocol):
    """Follows each sequence with a grammar through it. All calls come from the thread of the step loop."""

    def prepare(self, request: Request) -> None:
        """Begins to compile the grammar of a request, elsewhere; ``take_prepared`` hands the request back.

        Tokens that the request has generated already are followed too.
        """
        ...

    @property
    def has_prepared(self) -> bool:
        """Whether ``take_prepared`` has something to return. What ends a wait for it is up to the caller."""
        ...

    def take_prepared(self) -> Sequence[tuple[Request, str | None]]:
        """Requests whose grammars were compiled since the last call, each with what is wrong, or None."""
        ...

    def masks(self, shares: Iterable[ScheduledSequence]) -> TokenMasks | None:
        """What may be sampled by those shares of a step that sample and have grammars; None if none do.

        Their last tokens have been accepted.
        """
        ...

    def accept(self, request_id: str, token_id: int) -> Accepted:
        """Takes the token that was sampled for a sequence. Those that it forces count as accepted too."""
        ...

    def forget(self, request_id: str) -> bool:
        """Lets go of a request. Whether it was being prepared: it does not come back then."""
        ...

    def shutdown(self) -> None:
        """Ends what runs elsewhere."""
        ...


class NoGrammars:
    """Of an engine that cannot follow any: requests with grammars end with an error."""

    def __init__(self) -> None:
        self._refused: list[tuple[Request, str | None]] = []

    def prepare(self, request: Request) -> None:
        self._refused.append((request, "this engine follows no grammars"))

    @property
    def has_prepared(self) -> bool:
        return bool(self._refused)

    def take_prepared(self) -> Sequence[tuple[Request, str | None]]:
        refused, self._refused = self._refused, []
        return refused

    def masks(self, shares: Iterable[ScheduledSequence]) -> TokenMasks | None:
        return None

    def accept(self, request_id: str, token_id: int) -> Accepted:
        raise ValueError(f"request {request_id!r} has no grammar")

    def forget(self, request_id: str) -> bool:
        return False

    def shutdown(self) -> None:
        pass
