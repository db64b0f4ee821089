"""What ``inflightd serve`` shows in the terminal while it starts."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import TextIO

from server.transport import Progress, Ready

_BAR_WIDTH = 30


# In a log, this often a stage says how far it is, besides at its end.
_LINE_EVERY_S = 2.0


class Console:
    """Progress bars on a terminal, few lines a stage elsewhere; at last the address and a line to copy."""

    def __init__(
        self, model: str, url: str, started: float, stream: TextIO = sys.stderr, *, uds: str | None = None
    ) -> None:
        self._model = model
        self._url = url
        self._uds = uds
        self._started = started
        self._stream = stream
        self._last_line = started

    def show_progress(self, progress: Progress) -> None:
        stage, done, total = progress.stage, progress.done, progress.total
        is_done = done >= total
        if self._stream.isatty():
            filled = _BAR_WIDTH * done // max(total, 1)
            bar = "█" * filled + "░" * (_BAR_WIDTH - filled)
            self._write(f"\r{stage:<16} {bar} {done} of {total}" + ("\n" if is_done else ""))
            return
        now = time.monotonic()
        if is_done or now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            self._write(f"{stage}: {'done' if is_done else f'{done} of {total}'}\n")

    def show_ready(self, ready: Ready) -> None:
        seconds = time.monotonic() - self._started
        body = json.dumps({"model": self._model, "messages": [{"role": "user", "content": "Hello!"}]})
        place = self._url if self._uds is None else f"{self._uds} ({self._url})"
        curl = "curl" if self._uds is None else f"curl --unix-socket {self._uds}"
        self._write(
            f"\n{ready.memory_plan}\n\n"
            f"Serving {self._model} on {ready.spec.device} at {place} (ready in {seconds:.1f} s)\n"
            f"{curl} {self._url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n"
        )

    def _write(self, text: str) -> None:
        # A terminal that is gone, or a pipe that nobody reads, is no reason to stop serving.
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()
