"""What is answered from the head of a request alone: that the server lives, and that it has no room."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from server.admission import Admission
from server.api_keys import ApiKeys
from server.cors import Cors
from server.engine_protocol import EngineClient
from server.error_forms import in_form_of
from server.errors import ApiError, EngineDeadError
from server.guard import request_id_of, security_headers
from server.tgi_form import TgiError

_LIVE_PATH = b"/health/live"
_LIVE_BODY = b'{"status":"ok"}'
_TGI_PATHS = frozenset({b"/", b"/generate", b"/generate_stream"})
# What needs a place in the engine.
_GENERATING_PATHS = _TGI_PATHS | {
    b"/v1/chat/completions",
    b"/v1/completions",
    b"/v1/embeddings",
    b"/v1/messages",
    b"/v1/responses",
}


# Refusals that are sent at once: so many for each request that ends, and at least so many a second. What was
# not used of that in the last seconds may be used now. Nobody waits longer than the last says.
_REFUSALS_PER_END = 16.0
_MIN_REFUSALS_PER_S = 200.0
_FREE_S = 4.0
_MAX_DELAY_S = 5.0


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole response, but for the headers that are the connection's: its length, its end, the date.

    Attributes:
        delay: seconds after which it should be sent.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    delay: float = 0.0


class Doorman:
    """Stands before the application, so that what comes in vain costs a tenth of a millisecond and no task.

    - ``/health/live``: this process answers, whatever the engine does. Nobody needs a key for it.
    - A call that would need a place while there is none (``Admission.refusal``), or no engine: refused before
      its body is read, in the words of the path's API.

    Everything else is the application's, a request without a good key too.

    A server that is asked for ten times what it can do says so at once. Clients that never pause would use up
    the cores that the engine computes on, the faster the sooner they are answered. So beyond sixteen refusals
    for each request that ends, once there were that many for some seconds, each has to wait for its turn.
    """

    def __init__(
        self,
        engine: EngineClient,
        admission: Admission,
        api_keys: ApiKeys,
        cors: Cors,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._api_keys = api_keys
        self._cors = cors
        self._clock = clock
        self._turn = 0.0

    def reply(self, method: bytes, target: bytes, headers: Sequence[tuple[bytes, bytes]]) -> Reply | None:
        """The response to a request; None if the application has to look at it.

        Args:
            target: as it is in the request line.
            headers: with lower-case names.
        """
        path = target.partition(b"?")[0]
        if method == b"POST" and path in _GENERATING_PATHS:
            by_name = dict(headers)
            if b"idempotency-key" in by_name:  # what was answered before needs no place
                return None
            error = self._refusal(by_name)
            if error is None:
                return None
            request_id = request_id_of(by_name)
            if path in _TGI_PATHS:
                error = TgiError(error)
            error = in_form_of(path.decode(), error, request_id)
            return self._reply(error.status, error.headers, error.body(), by_name, request_id, self._delay())
        if path == _LIVE_PATH and method in (b"GET", b"HEAD"):
            by_name = dict(headers)
            return self._reply(200, {}, _LIVE_BODY, by_name, request_id_of(by_name))
        return None

    def _refusal(self, headers: Mapping[bytes, bytes]) -> ApiError | None:
        key = None
        if self._api_keys:
            key = self._api_keys.name_of(headers)
            if key is None:
                return None
        if not self._engine.is_ready:
            return EngineDeadError("not ready")
        return self._admission.refusal(key if self._api_keys.is_shared_by_several else None)

    def _delay(self) -> float:
        """Seconds until a refusal may be sent, which takes a turn."""
        now = self._clock()
        rate = max(_MIN_REFUSALS_PER_S, _REFUSALS_PER_END / self._admission.interval)
        self._turn = min(max(self._turn + 1 / rate, now - _FREE_S), now + _MAX_DELAY_S)
        return max(0.0, self._turn - now)

    def _reply(
        self,
        status: int,
        headers: Mapping[str, str],
        body: bytes,
        request: Mapping[bytes, bytes],
        request_id: str,
        delay: float = 0.0,
    ) -> Reply:
        return Reply(
            status,
            {
                "content-type": "application/json",
                "x-request-id": request_id,
                **security_headers,
                **self._cors.headers(request),
                **headers,
            },
            body,
            delay,
        )
