"""The one ASGI layer in front of every route: request ids, body limits, and no error but ours."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import uuid
from collections.abc import Collection, Mapping

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api_keys import ApiKeys, cache_scope
from server.cors import Cors
from server.error_forms import in_form_of
from server.errors import (
    ApiError,
    BodyTooLargeError,
    EngineDeadError,
    InternalError,
    InvalidApiKeyError,
    InvalidRequestError,
    RequestTimeoutError,
    ShuttingDownError,
    UnsupportedMediaTypeError,
)
from server.logs import http_request_id

_log = logging.getLogger(__name__)

# Where a response finds the server's own ``send`` in its scope. Once it has begun, what wraps ``send`` on the
# way (this guard, Starlette's error handling) has nothing to do, but would cost every token.
SEND_BODY = "inflightd.send_body"

# A liveness probe has no key; every other path, known or not, needs one where keys are set.
OPEN_PATHS = frozenset({"/health/live"})

# On every response that does not say otherwise: it is data and no page.
security_headers: Mapping[str, str] = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}

# A body may take so long, and a second more for each KB of it that has come.
_BODY_TIMEOUT_S = 30.0
_MIN_BODY_BYTES_PER_S = 1000.0

_LINGER_S = 2.0

_CLIENT_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/=+-]{1,128}")


class Guard:
    """Wraps an application.

    - Every response carries ``x-request-id``: the client's, if it is short and plain, else a new one.
    - With ``api_keys``, what carries none of them is refused before anything else is looked at.
      ``cache_scope`` is set to the name of the key if there are several, else to None.
    - Preflights of allowed origins are answered here, and need no key: browsers send none.
    - A body over ``max_body_bytes`` is refused before it is read if its length is announced, and at the byte
      that crosses the limit if it is not. Compressed bodies are refused, and those that take longer than
      30 s at less than 1 KB/s.
    - ``request.state.limits``, if a route sets it, are headers of the response.
    - Whatever is raised becomes the error object of the path's API, mostly OpenAI's. Exceptions that are no
      ``ApiError`` are logged with the request id and answered as a plain 500.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        api_keys: ApiKeys,
        cors: Cors,
        open_paths: Collection[str] = OPEN_PATHS,
        is_page_open: bool = False,
    ) -> None:
        """
        Args:
            open_paths: need no key.
            is_page_open: GET / needs no key.
        """
        self._open_paths = open_paths
        self._app = app
        self._is_page_open = is_page_open
        self._max_body_bytes = max_body_bytes
        self._api_keys = api_keys
        self._cors = cors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = request_id_of(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        http_request_id.set(request_id)
        scope[SEND_BODY] = send
        has_started = False
        is_reading = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        num_bytes = 0
        began = asyncio.get_running_loop().time()

        async def limited_receive() -> Message:
            nonlocal num_bytes, is_reading
            if is_reading:
                deadline = began + _BODY_TIMEOUT_S + num_bytes / _MIN_BODY_BYTES_PER_S
                try:
                    async with asyncio.timeout_at(deadline):
                        message = await receive()
                except TimeoutError:
                    raise RequestTimeoutError("The request's body took too long.") from None
            else:
                message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                is_reading = bool(message.get("more_body", False))
                if num_bytes > self._max_body_bytes:
                    raise self._too_large()
            return message

        async def marked_send(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                response_headers = MutableHeaders(scope=message)
                response_headers["x-request-id"] = request_id
                for name, value in security_headers.items():
                    response_headers.setdefault(name, value)
                response_headers.update(self._cors.headers(headers))
                for name, value in scope["state"].get("limits", {}).items():
                    response_headers.setdefault(name, value)
                if is_reading:
                    # What the client has yet to send would be taken for its next request.
                    response_headers["connection"] = "close"
            elif is_reading and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await _drain(receive)
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        preflight = self._cors.preflight(scope["method"], headers)
        if preflight is not None:
            await _send_whole(204, preflight, b"", marked_send)
            return
        try:
            cache_scope.set(self._authenticate(scope["method"], scope["path"], headers))
            self._check(headers)
            await self._app(scope, limited_receive, marked_send)
        except ClientDisconnect:
            return
        except asyncio.CancelledError:
            # uvicorn cancels what is still running at the end of its patience; this is the top of the task.
            if not has_started:
                told = api_error(ShuttingDownError(), request_id, scope["path"])
                await send_error(told, marked_send)
        except Exception as error:
            if has_started:
                _log.exception("request %s failed after its response had begun", request_id)
                raise
            await send_error(api_error(error, request_id, scope["path"]), marked_send)

    def _authenticate(self, method: str, path: str, headers: dict[bytes, bytes]) -> str | None:
        if not self._api_keys or path in self._open_paths:
            return None
        if self._is_page_open and path == "/" and method in ("GET", "HEAD"):
            return None
        name = self._api_keys.name_of(headers)
        if name is None:
            raise InvalidApiKeyError
        return name if self._api_keys.is_shared_by_several else None

    def _check(self, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length")
        if length is not None:
            if not length.isdigit():
                raise InvalidRequestError("The Content-Length header is not a number of bytes.")
            if len(length) > 18 or int(length) > self._max_body_bytes:
                raise self._too_large()
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise UnsupportedMediaTypeError("Compressed request bodies are not supported; send plain JSON.")

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"The request body is larger than {self._max_body_bytes} bytes.")


async def _drain(receive: Receive) -> None:
    """Takes what the client still sends, for a moment: closed at once, the connection would be reset, and an
    answer be lost that the client has not read."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while (await receive()).get("more_body", False):
                pass


def request_id_of(headers: Mapping[bytes, bytes]) -> str:
    """The client's ``x-request-id`` if it is short and plain, else a new one."""
    sent = headers.get(b"x-request-id")
    if sent is not None and _CLIENT_REQUEST_ID.fullmatch(sent):
        return sent.decode("ascii")
    return new_request_id()


def new_request_id() -> str:
    return f"req_{uuid.uuid4().hex}"


def api_error(error: Exception, request_id: str, path: str) -> ApiError:
    """What the client of ``path`` is told about an exception; what it is not told goes to the log."""
    if isinstance(error, EngineDeadError):
        _log.warning("request %s: %s", request_id, error.reason)
    elif not isinstance(error, ApiError):
        _log.error("request %s failed", request_id, exc_info=error)
        error = InternalError()
    return in_form_of(path, error, request_id)


async def send_error(error: ApiError, send: Send) -> None:
    """Sends an error as a whole response."""
    body = error.body()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    await _send_whole(error.status, headers, body, send)


async def _send_whole(status: int, headers: Mapping[str, str], body: bytes, send: Send) -> None:
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body, "more_body": False})
