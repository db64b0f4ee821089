"""Asks a server whether it is alive, as an orchestrator does, from a process of its own.

    python -m tests.benchmarks.health_probe PORT SECONDS

Prints the seconds that each answer took as a JSON list. Each question has a connection of its own; the next
is asked 50 ms after the answer. The process sleeps most of the time, so it is run soon after it wakes.
"""

from __future__ import annotations

import json
import socket
import sys
import time

_EVERY_S = 0.05
_QUESTION = b"GET /health/live HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n\r\n"


def probe(port: int, seconds: float) -> list[float]:
    """Seconds from the beginning of each connection to its answer; inf for none or another than 200."""
    took: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(_QUESTION)
                is_alive = connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        except OSError:
            is_alive = False
        took.append(time.perf_counter() - began if is_alive else float("inf"))
        time.sleep(_EVERY_S)
    return took


if __name__ == "__main__":
    print(json.dumps(probe(int(sys.argv[1]), float(sys.argv[2]))))
