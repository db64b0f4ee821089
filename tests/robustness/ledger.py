"""Books of requests: accepted, then tokens in order, then exactly one end.

What a request must answer is known from a quiet run. The ledger is told what came over the wire, event by
event, and says what is wrong with it; it knows nothing of sockets or servers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Expected:
    """The answer of a quiet server.

    Attributes:
        is_exact: the same request must get the same tokens whatever runs beside it; if not (bfloat16 on a GPU
            sums in another order in other batches), as many.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    is_exact: bool = True

    def is_met_by(self, other: Expected) -> bool:
        if self.is_exact:
            return other == self
        return (len(other.token_ids), other.finish_reason) == (len(self.token_ids), self.finish_reason)


@dataclass(slots=True)
class Entry:
    """One request. Tell it everything that happens, in order; ``Ledger.open`` makes it.

    The states are: sent, then refused, or accepted and then ended by ``[DONE]``, by an error event, by a
    cut connection or by the client itself (``cancel``).
    """

    name: str
    expected: Expected
    violations: list[str]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    num_reported: int | None = None
    end: str | None = None
    is_accepted: bool = False

    def accept(self) -> None:
        """The response has begun with status 200."""
        if self.is_accepted:
            self._violate("accepted twice")
        self.is_accepted = True

    def refuse(self, status: int) -> None:
        """An HTTP error. Whether it may be one is for the caller to judge."""
        if self.is_accepted:
            self._violate(f"refused with {status} after it was accepted")
        self._end("refused")

    def event(self, data: str) -> None:
        """The data of a server-sent event."""
        if not self.is_accepted:
            self._violate("an event before it was accepted")
        if self.end is not None:
            self._violate(f"an event after its end: {data[:80]}")
            return
        if data == "[DONE]":
            self._check_whole()
            self._end("done")
            return
        body: dict[str, Any] = json.loads(data)
        if "error" in body:
            self._violate(f"ended with an error: {body['error']}")
            self._end("error")
            return
        if usage := body.get("usage"):
            if self.num_reported is not None:
                self._violate("usage came twice")
            self.num_reported = usage["completion_tokens"]
        for choice in body.get("choices", ()):
            self._choice(choice)

    def close(self, *, is_clean: bool) -> None:
        """The server has ended the response (``is_clean``: with its last chunk) or the connection."""
        if self.end is None:
            self._violate("ended without an end" if is_clean else "the connection was cut")
            self._end("cut")

    def cancel(self) -> None:
        """The client has left."""
        if self.end is None:
            self._end("cancelled")

    def _choice(self, choice: Mapping[str, Any]) -> None:
        token_ids = list(choice.get("token_ids") or ())
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        if self.finish_reason is not None and (token_ids or text):
            self._violate("tokens after the finish reason")
        start = len(self.token_ids)
        self.token_ids += token_ids
        self.text += text
        wanted = self.expected.token_ids
        for position, token_id in enumerate(token_ids, start):
            if position >= len(wanted) or (self.expected.is_exact and token_id != wanted[position]):
                right = wanted[position] if position < len(wanted) else "none"
                self._violate(f"token {position} of {len(wanted)} is {token_id}, not {right}")
                break
        if reason := choice.get("finish_reason"):
            if self.finish_reason is not None:
                self._violate(f"finished twice: {self.finish_reason}, then {reason}")
            self.finish_reason = reason

    def _check_whole(self) -> None:
        wanted = self.expected
        if self.finish_reason != wanted.finish_reason:
            self._violate(f"finished by {self.finish_reason}, not {wanted.finish_reason}")
        if len(self.token_ids) != len(wanted.token_ids) or (
            wanted.is_exact and tuple(self.token_ids) != wanted.token_ids
        ):
            self._violate(f"{len(self.token_ids)} tokens that are not the {len(wanted.token_ids)} of before")
        if wanted.is_exact and self.text != wanted.text:
            self._violate(f"the text ends {self.text[-20:]!r}, not {wanted.text[-20:]!r}")
        if self.num_reported != len(wanted.token_ids):
            self._violate(f"usage says {self.num_reported} tokens, not {len(wanted.token_ids)}")

    def _end(self, how: str) -> None:
        if self.end is not None:
            self._violate(f"ended twice: {self.end}, then {how}")
        self.end = how

    def _violate(self, what: str) -> None:
        self.violations.append(f"{self.name}: {what}")


class Ledger:
    """All requests of a run.

    Attributes:
        violations: what was wrong, in the order in which it was seen.
        ends: how many requests ended how.
        num_tokens: of the requests that have been closed.
    """

    def __init__(self) -> None:
        self.violations: list[str] = []
        self.ends: Counter[str] = Counter()
        self.num_tokens = 0
        self._open: dict[int, Entry] = {}
        self._num_opened = 0

    def open(self, name: str, expected: Expected) -> Entry:
        """Enters a request that is about to be sent."""
        self._num_opened += 1
        entry = Entry(f"request {self._num_opened} ({name})", expected, self.violations)
        self._open[id(entry)] = entry
        return entry

    def settle(self, entry: Entry) -> None:
        """Closes the books on a request: it must have ended."""
        del self._open[id(entry)]
        if entry.end is None:
            self.violations.append(f"{entry.name}: never ended")
        self.ends[entry.end or "never"] += 1
        self.num_tokens += len(entry.token_ids)

    def balance(self) -> None:
        """At the end of a run: nothing may be open any more."""
        for entry in list(self._open.values()):
            self.settle(entry)
