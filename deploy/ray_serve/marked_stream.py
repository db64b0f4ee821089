"""A stream of a daemon on its way to the client, from which it can go on at another daemon."""

from __future__ import annotations

import json
from typing import Any

_BOUNDARY = b"\n\n"
_MARK = b": resume "
_COMMENT = b":"
_ERROR = b'data: {"error":'
# Ends that another daemon need not share.
_CODES_OF_LOST = frozenset({"shutting_down", "engine_unavailable"})


class MarkedStream:
    """Takes out the marks (see ``server.resume``) and holds back events until the mark behind them has come.

    All that was passed on comes from the tokens of the marks, and nothing is missing: the stream can go on
    from there. The bytes between the marks stay as they are.
    """

    def __init__(self) -> None:
        self._partial = b""
        self._held: list[bytes] = []
        self._marks: list[bytes] = []

    @property
    def has_marks(self) -> bool:
        """Whether anything was passed on that another daemon must not say again."""
        return bool(self._marks)

    def feed(self, data: bytes) -> bytes:
        """Takes bytes of the daemon and returns those that the client may have now."""
        *events, self._partial = (self._partial + data).split(_BOUNDARY)
        ready: list[bytes] = []
        for event in events:
            if event.startswith(_MARK):
                self._marks.append(event[len(_MARK) :])
                ready += self._held
                self._held.clear()
            elif event.startswith(_COMMENT) and not self._held:
                ready.append(event)
            else:
                self._held.append(event)
        return b"".join(event + _BOUNDARY for event in ready)

    @property
    def is_cut_short(self) -> bool:
        """Whether the daemon, which sends no more, has ended with an error that is only its own."""
        if not self._held or not self._held[-1].startswith(_ERROR):
            return False
        try:
            return json.loads(self._held[-1][len(b"data: ") :])["error"]["code"] in _CODES_OF_LOST
        except (ValueError, KeyError, TypeError):
            return False

    def finish(self) -> bytes:
        """What is left at the proper end of the stream."""
        rest = b"".join(event + _BOUNDARY for event in self._held) + self._partial
        self._held.clear()
        self._partial = b""
        return rest

    def resumed_body(self, body: bytes) -> bytes:
        """The request of another daemon for the rest of the stream; forgets what is held back.

        Args:
            body: of the request. It led to a stream, so that it is an object and not empty.
        """
        self._held.clear()
        self._partial = b""
        if not self._marks:
            return body
        said = [json.loads(mark) for mark in self._marks]
        resume: dict[str, Any] = said[0] | {
            "token_ids": [token for mark in said for token in mark["token_ids"]]
        }
        return body.rstrip(b" \t\r\n")[:-1] + b',"resume":' + json.dumps(resume).encode() + b"}"
