"""Loaded by each Python process that has this folder on its path: notes whatever goes to the network.

``EGRESS_LOG`` names the file. Unix sockets are no network.
"""

from __future__ import annotations

import os
import sys

_EVENTS = {
    "socket.connect",
    "socket.sendto",
    "socket.sendmsg",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.gethostbyaddr",
}


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event in _EVENTS and not isinstance(arguments[-1], str | bytes):  # the path of a unix socket
        with open(os.environ["EGRESS_LOG"], "a") as log:
            log.write(
                f"{event} {arguments[1:] if event[7:] in ('connect', 'sendto', 'sendmsg') else arguments}\n"
            )


sys.addaudithook(_note)
