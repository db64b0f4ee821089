"""Everything that can go wrong with a request, and OpenAI's error object that tells the client.

The body is always ``{"error": {"message", "type", "param", "code"}}``. A message says what to change. It
never holds a traceback, a path, an address, or more of the client's own text than a short, escaped piece.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec


class ApiError(Exception):
    """A request that is answered with an error. The subclasses fix status, type and usual code.

    Attributes:
        param: the field at fault, as a path such as ``messages[0].content``.
        headers: sent with the response, such as ``retry-after``.
    """

    status = 500
    type = "server_error"
    default_code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """OpenAI's error object as JSON."""
        return msgspec.json.encode(
            {
                "error": {
                    "message": self.message,
                    "type": self.type,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def event(self) -> bytes:
        """The error as the last event of a stream."""
        return b"data: " + self.body() + b"\n\n"


class InvalidRequestError(ApiError):
    status = 400
    type = "invalid_request_error"


class InvalidJsonError(InvalidRequestError):
    default_code = "invalid_json"


class UnsupportedParameterError(InvalidRequestError):
    """A field of the API that this server knows but does not honour."""

    default_code = "unsupported_parameter"


class UnknownParameterError(InvalidRequestError):
    """A field that nobody knows, where the operator wants that told."""

    default_code = "unknown_parameter"


class ContextLengthError(InvalidRequestError):
    default_code = "context_length_exceeded"


class ModelNotFoundError(InvalidRequestError):
    status = 404
    default_code = "model_not_found"


class InvalidApiKeyError(InvalidRequestError):
    """No key, or none that is known. The message does not say which, nor repeats it."""

    status = 401
    default_code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__(
            "Incorrect API key provided. Send one as 'Authorization: Bearer KEY'.",
            headers={"www-authenticate": "Bearer"},
        )


class ResponseNotFoundError(InvalidRequestError):
    status = 404
    default_code = "response_not_found"


class UnknownUrlError(InvalidRequestError):
    status = 404
    default_code = "unknown_url"


class MethodNotAllowedError(InvalidRequestError):
    status = 405
    default_code = "method_not_allowed"


class ConflictError(InvalidRequestError):
    """An ``Idempotency-Key`` that another request has. To try again helps only if the headers say so."""

    status = 409

    def __init__(self, message: str, *, code: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, code=code, headers={"x-should-retry": "false", **(headers or {})})


class RequestTimeoutError(InvalidRequestError):
    """The client sent too slowly."""

    status = 408
    default_code = "request_timeout"


class UriTooLongError(InvalidRequestError):
    status = 414
    default_code = "uri_too_long"


class HeadersTooLargeError(InvalidRequestError):
    status = 431
    default_code = "headers_too_large"


class BodyTooLargeError(InvalidRequestError):
    status = 413
    default_code = "request_too_large"


class UnsupportedMediaTypeError(InvalidRequestError):
    status = 415
    default_code = "unsupported_media_type"


class TooManyRequestsError(ApiError):
    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"retry-after": "1"})


class InternalError(ApiError):
    """A fault of ours. The cause is logged under the request id; the client learns the id only."""

    def __init__(self) -> None:
        super().__init__(
            "The server had an error while processing your request. If it persists, give the operator the "
            "x-request-id of this response.",
        )


class EngineDeadError(ApiError):
    """The engine is not there: still loading, being restarted, or gone.

    ``reason`` is for the log. It may name paths, so that the client gets a fixed message.
    """

    status = 503
    default_code = "engine_unavailable"

    def __init__(self, reason: str) -> None:
        super().__init__(
            "The model is not available at the moment. Try again in a few seconds.",
            headers={"retry-after": "1"},
        )
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class OverloadedError(ApiError):
    """The line in front of the engine is full, or one key has its share.

    Args:
        reason: which bound: ``requests``, ``tokens`` or ``key``.
        limit, remaining: of the bound.
        wait: seconds after which another try makes sense.
    """

    status = 429

    def __init__(self, reason: str, limit: int, remaining: int, wait: float) -> None:
        kind = "tokens" if reason == "tokens" else "requests"
        if reason == "key":
            message = (
                f"Your key has {limit} requests running, which is its limit. Wait until one is finished."
            )
        else:
            message = "The server has as many requests waiting as it takes. Try again a little later."
        super().__init__(
            message,
            code="rate_limit_exceeded" if reason == "key" else "server_overloaded",
            headers={
                **_retry_headers(wait),
                f"x-ratelimit-limit-{kind}": str(limit),
                f"x-ratelimit-remaining-{kind}": str(remaining),
                f"x-ratelimit-reset-{kind}": f"{wait:.1f}s",
            },
        )
        self.type = kind


class QueueTimeoutError(ApiError):
    """A request waited for the engine as long as it may."""

    status = 503
    default_code = "queue_timeout"

    def __init__(self, wait: float) -> None:
        super().__init__("The server is too busy to begin with this request.", headers=_retry_headers(wait))


class DeadlineError(ApiError):
    """An answer took longer than the operator allows; another try would too."""

    status = 504
    default_code = "request_timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"The answer took longer than {seconds} s, which is this server's limit. Ask for fewer tokens.",
            headers={"x-should-retry": "false"},
        )


def _retry_headers(wait: float) -> dict[str, str]:
    return {"retry-after": str(math.ceil(wait)), "retry-after-ms": str(int(wait * 1000))}


class DrainingError(ApiError):
    """An operator has this server take no new requests."""

    status = 503
    default_code = "draining"

    def __init__(self) -> None:
        super().__init__(
            "This server takes no new requests at the moment. Try again a little later.",
            headers=_retry_headers(_DRAINING_WAIT_S),
        )


class AbortedError(ApiError):
    """An operator has ended this request; another try would not be welcome."""

    default_code = "request_aborted"

    def __init__(self) -> None:
        super().__init__(
            "The operator of this server has ended this request.", headers={"x-should-retry": "false"}
        )


class ProfileRunningError(InvalidRequestError):
    status = 409
    default_code = "profile_running"

    def __init__(self) -> None:
        super().__init__("A profile is being taken. Try again when it is complete.")


class ShuttingDownError(ApiError):
    """The server had to end before the answer was complete."""

    status = 503
    default_code = "shutting_down"

    def __init__(self) -> None:
        super().__init__(
            "The server is shutting down. Send the request again in a few seconds.",
            headers={"retry-after": "1"},
        )


_DRAINING_WAIT_S = 5.0
_EXCERPT_CHARS = 64


def excerpt(text: str) -> str:
    """The client's own text as an error message may show it: short, printable ASCII, quoted."""
    shown = text if len(text) <= _EXCERPT_CHARS else text[:_EXCERPT_CHARS] + "..."
    return ascii(shown)
