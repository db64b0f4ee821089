"""In whose words an error is told: OpenAI's, but on the paths that speak Anthropic's API."""

from __future__ import annotations

import msgspec

from server.errors import ApiError, DrainingError, EngineDeadError, QueueTimeoutError, ShuttingDownError

_ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


class AnthropicError(ApiError):
    """An error in Anthropic's form: ``{"type": "error", "error": {"type", "message"}, "request_id"}``."""

    def __init__(self, error: ApiError, request_id: str) -> None:
        headers = {**error.headers, "request-id": request_id}
        super().__init__(error.message, param=error.param, code=error.code, headers=headers)
        self.status = error.status
        self.type = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error")
        if isinstance(error, (DrainingError, EngineDeadError, QueueTimeoutError, ShuttingDownError)):
            self.type = "overloaded_error"
        elif error.status >= 500:
            self.type = "api_error"
        self._request_id = request_id

    def body(self) -> bytes:
        return msgspec.json.encode(
            {
                "type": "error",
                "error": {"type": self.type, "message": self.message},
                "request_id": self._request_id,
            }
        )

    def event(self) -> bytes:
        return b"event: error\ndata: " + self.body() + b"\n\n"


def in_form_of(path: str, error: ApiError, request_id: str) -> ApiError:
    """The error as clients of ``path`` expect it."""
    is_anthropic = path == _ANTHROPIC_PATH or path.startswith(_ANTHROPIC_PATH + "/")
    if is_anthropic and not isinstance(error, AnthropicError):
        return AnthropicError(error, request_id)
    return error
