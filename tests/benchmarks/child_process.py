"""A process of a benchmark's own, and the line to it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

STOP = "stop"
_PATIENCE_S = 20.0


@contextmanager
def child_process(target: Callable[..., None], *args: Any) -> Iterator[Connection]:
    """Runs ``target(line, *args)`` in a fresh process; in the end it is told ``STOP``, and killed after 20 s.

    Reading from the line raises EOFError once the process has ended.
    """
    spawn = multiprocessing.get_context("spawn")
    line, its_end = spawn.Pipe()
    process = spawn.Process(target=target, args=(its_end, *args))
    process.start()
    its_end.close()  # as long as anybody else has it open, the line does not end with the process
    try:
        yield line
    finally:
        with suppress(OSError):
            line.send(STOP)
        line.close()  # nor does it wait for somebody to read what it says
        process.join(_PATIENCE_S)
        if process.is_alive():
            process.kill()
            process.join()


def asked(line: Connection) -> str:
    """The next question in a child process; ``STOP`` if its parent has died."""
    try:
        question: str = line.recv()
    except EOFError:
        return STOP
    return question
