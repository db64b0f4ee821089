"""Which web pages may call: cross-origin resource sharing, as the Fetch standard has it."""

from __future__ import annotations

import re
from collections.abc import Mapping

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/,?#@*]+")
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,1024}")


def parse_origins(text: str) -> tuple[str, ...]:
    """``ORIGIN[,ORIGIN]`` or ``*``. Raises ValueError."""
    origins = tuple(part.strip().lower() for part in text.split(",") if part.strip())
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ValueError(f"{origin!r} is neither * nor an origin such as https://chat.example:8443")
    if not origins:
        raise ValueError("it needs at least one origin")
    return origins


class Cors:
    """Headers that let pages of some origins read responses.

    Credentials, which is cookies, are never allowed: keys come in a header that the page itself sets.
    """

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._is_for_all = "*" in origins
        self._origins = frozenset(origin.encode() for origin in origins)

    def headers(self, request: Mapping[bytes, bytes]) -> dict[str, str]:
        """What a response carries. Caches must know that it depends on the origin, allowed or not."""
        if not self._origins:
            return {}
        vary = {} if self._is_for_all else {"vary": "origin"}
        if not self._allows(request):
            return vary
        origin = "*" if self._is_for_all else request[b"origin"].decode("latin-1")
        return {
            **vary,
            "access-control-allow-origin": origin,
            "access-control-expose-headers": "x-request-id, retry-after",
        }

    def preflight(self, method: str, request: Mapping[bytes, bytes]) -> dict[str, str] | None:
        """What else the answer to a preflight of an allowed origin carries; None if it is none."""
        if method != "OPTIONS" or b"access-control-request-method" not in request:
            return None
        if not self._allows(request):
            return None
        headers = {"access-control-allow-methods": "GET, HEAD, POST, DELETE", "access-control-max-age": "600"}
        names = request.get(b"access-control-request-headers", b"")
        if _HEADER_NAMES.fullmatch(names):  # repeated, for * would leave authorization out
            headers["access-control-allow-headers"] = names.decode("ascii")
        return headers

    def _allows(self, request: Mapping[bytes, bytes]) -> bool:
        origin = request.get(b"origin")
        return origin is not None and (origin in self._origins or self._is_for_all)
