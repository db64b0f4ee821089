"""Whether the engine is getting on."""

from __future__ import annotations

import time
from collections.abc import Callable

_LATE_S = 4.0
_HUNG_S = 30.0
# Steps of a large model on a small machine may take longer: in multiples of what they took lately.
_LATE_STEPS = 8.0
_HUNG_STEPS = 32.0
_NEWEST_SHARE = 0.1


class Watchdog:
    """Compares the age of the running step with how long steps take.

    A busy engine reports after every step. ``started_work`` and ``heard`` say that it has begun, and that it
    has reported; the rest is asked now and then, with whether it has work at all.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._mean = 0.0
        self._was_late = False

    def started_work(self) -> None:
        """The engine gets its first request after it had none, or is a new one."""
        self._since = self._clock()
        self._was_late = False

    def heard(self) -> None:
        now = self._clock()
        self._mean += _NEWEST_SHARE * (now - self._since - self._mean)
        self._since = now
        self._was_late = False

    def is_late(self, has_work: bool) -> bool:
        """Whether a step takes suspiciously long, at two questions in a row.

        Two, since this process may have slept itself: then what the engine has reported is still unread.
        """
        was_late, self._was_late = (
            self._was_late,
            has_work and self._age > max(_LATE_S, _LATE_STEPS * self._mean),
        )
        return was_late and self._was_late

    def is_hung(self, has_work: bool) -> bool:
        """Whether nothing is to be expected any more. Ask ``is_late`` first."""
        return self._was_late and has_work and self._age > max(_HUNG_S, _HUNG_STEPS * self._mean)

    @property
    def _age(self) -> float:
        return self._clock() - self._since
