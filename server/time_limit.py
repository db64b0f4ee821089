"""An end for Python code that does not come to one by itself, in whatever thread it runs."""

from __future__ import annotations

import ctypes
import threading
import time
from types import TracebackType

_LOOK_EVERY_S = 0.25


class TimeLimitError(Exception):
    """Raised in the code that took too long."""


class _Watcher(threading.Thread):
    """Raises TimeLimitError in threads that are past their deadline; sleeps while there is none."""

    def __init__(self) -> None:
        super().__init__(name="time-limit", daemon=True)
        self.deadlines: dict[int, float] = {}
        self.has_work = threading.Event()

    def run(self) -> None:
        while self.has_work.wait():
            time.sleep(_LOOK_EVERY_S)
            if not self.deadlines:
                self.has_work.clear()
                if not self.deadlines:
                    continue
                self.has_work.set()
            for thread, deadline in list(self.deadlines.items()):
                # Whoever takes the entry out decides: this thread raises, the other one waits for that.
                if time.monotonic() > deadline and self.deadlines.pop(thread, None) is not None:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread), ctypes.py_object(TimeLimitError)
                    )


_watcher = _Watcher()


class TimeLimit:
    """``with TimeLimit(seconds)``: raises TimeLimitError inside if that takes longer.

    Only between two instructions of Python: a call that computes in C for hours is not interrupted. Not to be
    nested in one thread.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        if not _watcher.is_alive():
            _start()
        _watcher.deadlines[threading.get_ident()] = time.monotonic() + self._seconds
        _watcher.has_work.set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_late = _watcher.deadlines.pop(threading.get_ident(), None) is None
        if is_late and kind is not TimeLimitError:
            for _ in range(1000):  # it is on its way, and must not strike later
                time.sleep(0.001)


_starting = threading.Lock()


def _start() -> None:
    with _starting:
        if not _watcher.is_alive():
            _watcher.start()
