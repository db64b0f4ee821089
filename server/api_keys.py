"""The keys that clients may show: kept as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

_MAX_KEY_BYTES = 512
_KEY = re.compile(rf"[!-~]{{1,{_MAX_KEY_BYTES}}}")  # what a header can carry, without spaces
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MAX_FILE_BYTES = 2**20

# Whose prefix-cache blocks the current request may share: a name without colons; None, everybody's. It comes
# with the context rather than through the routes, so that no route can forget it.
cache_scope: ContextVar[str | None] = ContextVar("cache_scope", default=None)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that is let in.

    Attributes:
        name: whose it is. Keys of one name share prefix-cache blocks, so that a key can be replaced.
        digest: SHA-256 of the key.
    """

    name: str
    digest: bytes = field(repr=False)


def api_key(text: str, name: str | None = None) -> ApiKey:
    """Raises ValueError, whose message does not repeat the key."""
    if not _KEY.fullmatch(text):
        raise ValueError(f"a key is 1 to {_MAX_KEY_BYTES} printable ASCII characters without spaces")
    digest = hashlib.sha256(text.encode()).digest()
    return ApiKey(name or f"key-{digest.hex()[:16]}", digest)


def parse_api_keys(text: str) -> tuple[ApiKey, ...]:
    """``KEY[,KEY]``. Raises ValueError."""
    keys = tuple(api_key(part.strip()) for part in text.split(",") if part.strip())
    if not keys:
        raise ValueError("it needs at least one key")
    return keys


def read_api_keys(path: str) -> tuple[ApiKey, ...]:
    """The keys of a file: ``name:key`` or ``key`` a line, ``#`` begins a comment line.

    Raises:
        ValueError: it cannot be read, others may read it, or it holds no key or something else.
    """
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{path} is not a file")
            if status.st_mode & stat.S_IROTH:
                raise ValueError(f"{path} can be read by every user: chmod 600 it")
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    if len(content) > _MAX_FILE_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_FILE_BYTES} bytes")
    keys = []
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, colon, key = (part.strip() for part in line.partition(":"))
        try:
            if colon and not _NAME.fullmatch(name):
                raise ValueError("a name is 1 to 64 letters, digits, dots, dashes and underscores")
            keys.append(api_key(key, name) if colon else api_key(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not keys:
        raise ValueError(f"{path} holds no key")
    return tuple(keys)


class ApiKeys:
    """Tells whose key a request carries."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._keys = tuple(keys)
        self.is_shared_by_several = len({key.name for key in self._keys}) > 1

    def __bool__(self) -> bool:
        return bool(self._keys)

    def name_of(self, headers: Mapping[bytes, bytes]) -> str | None:
        """The name of the key in ``authorization: Bearer`` or, for Anthropic's clients, ``x-api-key``."""
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        name = self._matching(token.strip()) if scheme.lower() == b"bearer" else None
        return name or self._matching(headers.get(b"x-api-key", b""))

    def _matching(self, sent: bytes) -> str | None:
        if not 0 < len(sent) <= _MAX_KEY_BYTES:
            return None
        digest = hashlib.sha256(sent).digest()
        found = None
        for key in self._keys:  # all of them: the time must not tell which
            if hmac.compare_digest(key.digest, digest):
                found = key.name
        return found
