"""Which replica should answer a request: the one that has seen its prefix, while its load allows.

Rendezvous hashing gives each prefix an order of all replicas, which changes little when replicas come and
go. The first of them takes the request unless it has clearly more to do than the others (consistent hashing
with bounded loads, Mirrokni et al., arXiv:1608.01350). Nothing is remembered, so that any number of routers
agree.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

# What a prompt begins with, in the order in which the APIs put it together.
_BEGINNINGS = ("system", "instructions", "messages", "input", "prompt", "inputs")


def prefix_of(body: bytes, max_chars: int) -> bytes | None:
    """What requests have in common that may share keys and values; None if the body has no prompt.

    It is the beginning of the prompt, ``max_chars`` characters at most, but no more than the first message
    of the user, so that all turns of a conversation have the same. Requests of different ``cache_salt``
    share nothing.
    """
    try:
        fields = json.loads(body)
        if not isinstance(fields, dict):
            return None
        text = _beginning(fields, max_chars)
    except (ValueError, RecursionError):  # the daemon says what is wrong
        return None
    if not text.strip("\0"):
        return None
    return f"{fields.get('cache_salt') or ''}\0{text}".encode("utf-8", "surrogatepass")


def preference(
    prefix: bytes | None,
    loads: Mapping[str, int],
    *,
    slack: float = 1.25,
    free_load: int = 2,
    avoided: Collection[str] = (),
) -> list[str]:
    """All replicas, the best for a request first.

    Args:
        prefix: None: the one with the least to do.
        loads: the requests that each replica works on.
        slack: a replica takes a request of its prefixes as long as it then has at most ``slack`` times as
            many requests as the mean; above 1.
        free_load: a replica takes so many requests at least, whatever the mean is.
        avoided: come last.
    """
    usable = [replica for replica in loads if replica not in avoided]
    mean = (sum(loads[replica] for replica in usable) + 1) / max(len(usable), 1)
    bound = max(math.ceil(slack * mean), free_load)

    def rank(replica: str) -> tuple[bool, bool, int, bytes]:
        is_full = prefix is None or loads[replica] >= bound
        order = hashlib.blake2b(replica.encode(), key=hashlib.sha256(prefix or b"").digest()).digest()
        return replica in avoided, is_full, loads[replica] if is_full else 0, order

    return sorted(loads, key=rank)


def _beginning(fields: Mapping[str, Any], max_chars: int) -> str:
    """The first ``max_chars`` characters of the prompt's texts and token ids, a NUL behind each."""
    text = ""
    for name in _BEGINNINGS:
        for piece in _pieces(_up_to_user(fields.get(name))):
            text += piece[: max_chars - len(text)] + "\0"
            if len(text) >= max_chars:
                return text[:max_chars]
    return text


def _up_to_user(value: Any) -> Any:
    """Of a conversation, what comes up to the first message of the user; other values as they are."""
    if not isinstance(value, list):
        return value
    for index, item in enumerate(value):
        if isinstance(item, dict) and item.get("role") == "user":
            return value[: index + 1]
    return value


def _pieces(value: Any) -> Iterator[str]:
    """The texts and token ids in a value, in their order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, int):
        yield str(value)
    elif isinstance(value, list):
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _pieces(item)
