"""Where lines of the log go: to a stream that may be slow, full or gone, and is waited for by nobody."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from typing import TextIO

_MAX_LINES = 10_000
# At the end of the process, what waits gets so long to be written.
_CLOSE_S = 0.5


class LogWriter(logging.Handler):
    """Formats lines at once and writes them in a thread of its own.

    A pipe that nobody reads would otherwise stop the process with the next line, and a full disk fill its log
    with complaints. What cannot be written is lost: lines over 10,000 that wait are counted, and the count is
    the next line.
    """

    def __init__(self, stream: TextIO, max_lines: int = _MAX_LINES) -> None:
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(max_lines)
        self._num_lost = 0
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._num_lost += 1

    def flush(self) -> None:
        """Waits until all is written, half a second at most."""
        deadline = time.monotonic() + _CLOSE_S
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)

    def close(self) -> None:
        self.flush()
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        super().close()

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            if self._num_lost:
                num_lost, self._num_lost = self._num_lost, 0
                line = f"{num_lost} lines of the log were lost: nobody took them\n{line}"
            with contextlib.suppress(OSError, ValueError):  # full, gone, closed
                self._stream.write(line + "\n")
                self._stream.flush()
            self._lines.task_done()
