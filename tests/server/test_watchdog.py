from __future__ import annotations

from server.watchdog import Watchdog


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _asked(watchdog: Watchdog, has_work: bool = True) -> tuple[bool, bool]:
    return watchdog.is_late(has_work), watchdog.is_hung(has_work)


def test_a_step_is_late_and_later_hung() -> None:
    clock = _Clock()
    watchdog = Watchdog(clock)
    clock.now = 100.0
    watchdog.started_work()
    seen = []
    for clock.now in (103.9, 104.1, 104.6, 129.9, 130.1):
        seen.append(_asked(watchdog))
    assert seen == [(False, False), (False, False), (True, False), (True, False), (True, True)]
    watchdog.heard()
    assert _asked(watchdog) == (False, False)


def test_an_engine_without_work_is_never_late() -> None:
    clock = _Clock()
    watchdog = Watchdog(clock)
    clock.now = 1000.0
    assert [_asked(watchdog, has_work=False) for _ in range(3)] == [(False, False)] * 3
    watchdog.started_work()
    assert [_asked(watchdog) for _ in range(3)] == [(False, False)] * 3


def test_who_has_slept_looks_again_before_suspecting() -> None:
    clock = _Clock()
    watchdog = Watchdog(clock)
    watchdog.started_work()
    clock.now = 60.0
    assert not watchdog.is_late(True)
    watchdog.heard()  # it was in the socket all the time
    assert not watchdog.is_late(True)


def test_steps_of_a_slow_machine_may_take_long() -> None:
    clock = _Clock()
    watchdog = Watchdog(clock)
    watchdog.started_work()
    for _ in range(50):
        clock.now += 10.0
        watchdog.heard()
    clock.now += 40.0
    assert [_asked(watchdog) for _ in range(2)] == [(False, False)] * 2
    clock.now += 50.0
    assert [_asked(watchdog) for _ in range(2)] == [(False, False), (True, False)]
    clock.now += 300.0
    assert _asked(watchdog) == (True, True)
