"""A request body as a JSON object, strictly: RFC 8259 in UTF-8, no duplicate names, bounded depth.

Non-finite numbers get through this step (``1e999`` is valid JSON, ``NaN`` is not but says what was meant), so
that the wire models can refuse them naming the field.
"""

from __future__ import annotations

import asyncio
import codecs
from typing import Any

import jiter
from starlette.requests import Request

from server.errors import InvalidJsonError, InvalidRequestError, UnsupportedMediaTypeError

# Above this a body is parsed and validated in a thread. Both hold the GIL, but a thread gives it up between
# the calls, so that the streams go on.
OFF_LOOP_BYTES = 256 * 1024


def parse_json(data: bytes, subject: str, param: str | None = None) -> Any:
    """Raises InvalidJsonError about ``subject``, saying where it stops being JSON."""
    try:
        return jiter.from_json(data, allow_inf_nan=True, catch_duplicate_keys=True)
    except ValueError as error:
        reason = _reason(error)
        if data.startswith(codecs.BOM_UTF8):
            reason = "it begins with a byte order mark, which some editors write; save it without"
        raise InvalidJsonError(f"{subject} is not valid JSON: {reason}.", param=param) from None


def parse_json_object(body: bytes) -> dict[str, Any]:
    """A request body. Raises InvalidJsonError, saying where it stops being JSON."""
    if not body:
        raise InvalidJsonError("The request body is empty; it must be a JSON object.")
    value = parse_json(body, "The request body")
    if not isinstance(value, dict):
        kind = "an array" if isinstance(value, list) else "a single value"
        raise InvalidJsonError(f"The request body must be a JSON object, not {kind}.")
    return value


def _reason(error: ValueError) -> str:
    reason = str(error)
    if reason.startswith("Detected duplicate key"):
        # The name is the client's own text, of any length.
        return "an object has the same name twice" + reason[reason.rfind(" at line ") :]
    return reason


def check_content_type(header: str | None) -> None:
    """Raises if the header is missing or names anything but JSON in UTF-8."""
    if header is None:
        raise InvalidRequestError("The Content-Type header is missing; send 'application/json'.")
    media_type, *parameters = (part.strip().lower() for part in header.split(";"))
    is_utf8 = all(
        parameter.partition("=")[2].strip('"') in ("utf-8", "utf8")
        for parameter in parameters
        if parameter.startswith("charset=")
    )
    if media_type != "application/json" or not is_utf8:
        raise UnsupportedMediaTypeError(
            "The Content-Type must be 'application/json' in UTF-8 "
            "(with curl: -H 'Content-Type: application/json')."
        )


async def read_json_object(request: Request) -> tuple[dict[str, Any], int]:
    """The body of a request and its length. Raises ApiError. The guard limits the size while it is read."""
    check_content_type(request.headers.get("content-type"))
    body = await request.body()
    if len(body) <= OFF_LOOP_BYTES:
        return parse_json_object(body), len(body)
    return await asyncio.get_running_loop().run_in_executor(None, parse_json_object, body), len(body)
