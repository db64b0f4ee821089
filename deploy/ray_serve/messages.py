"""What goes from the endpoint to a replica and back."""

from __future__ import annotations

from dataclasses import dataclass

Headers = tuple[tuple[bytes, bytes], ...]

# They are about one connection (RFC 9110, 7.6.1), or each server writes its own.
_OF_CONNECTION = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection",
        b"te", b"trailer", b"transfer-encoding", b"upgrade", b"host", b"date", b"server",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ProxiedRequest:
    """A request as the client sent it.

    Attributes:
        target: path and query.
        prefix: by which it is routed; None: wherever there is room.
        avoided: ids of replicas that were lost with it.
    """

    method: str
    target: bytes
    headers: Headers
    body: bytes
    prefix: bytes | None = None
    avoided: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """What comes first; the bytes of the body follow."""

    status: int
    headers: Headers
    replica_id: str


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """Comes instead of the rest: the daemon went away."""

    replica_id: str


def end_to_end(headers: Headers) -> Headers:
    """The headers that are for the other end: names in lower case, values without the blanks around them.

    A parser may leave blanks behind a value, which must not be sent on (RFC 9112, 5.1).
    """
    lowered = [(name.lower(), value.strip(b" \t")) for name, value in headers]
    listed = {
        name.strip().lower()
        for header, value in lowered
        if header == b"connection"
        for name in value.split(b",")
    }
    left = _OF_CONNECTION | listed
    return tuple((name, value) for name, value in lowered if name not in left)
