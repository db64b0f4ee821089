"""A process for work that strangers can make arbitrarily hard: it may be lost, and nothing else is.

Frames go both ways over its standard input and output: a length (4 bytes, little-endian), then so many bytes.
It bounds its own time and memory, with means of the kernel that work whatever it is busy with.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable


class ExpendableProcess:
    """Answers one question after the other. Started for the first, and again after it was lost.

    Not for several threads at a time.
    """

    def __init__(self, module: str, greeting: Callable[[], bytes] | None = None) -> None:
        """
        Args:
            module: what it runs.
            greeting: makes a frame that it gets before the first question.
        """
        self._module = module
        self._greeting = greeting
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: bytes) -> bytes | None:
        """The answer, or None if the process was lost with the question."""
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(_frame(question))
            self._process.stdin.flush()
            head = self._process.stdout.read(4)
            answer = self._process.stdout.read(int.from_bytes(head, "little"))
        except OSError:
            head, answer = b"", b""
        if len(head) < 4 or len(answer) < int.from_bytes(head, "little"):
            self.close()
            return None
        return answer

    def close(self) -> None:
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError):
                process.communicate()

    def _start(self) -> None:
        command = [sys.executable, "-m", self._module]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        if self._greeting is not None:
            self._process.stdin.write(_frame(self._greeting()))


def _frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body
