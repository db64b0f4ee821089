from __future__ import annotations

import resource

import pytest

from server.open_files import raise_open_files


class Limits:
    """The process's limit, as ``resource`` knows it."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, *, is_fixed: bool = False
    ) -> None:
        self.now = (soft, hard)
        self._is_fixed = is_fixed
        monkeypatch.setattr(resource, "getrlimit", lambda kind: self.now)
        monkeypatch.setattr(resource, "setrlimit", self._set)

    def _set(self, kind: int, limits: tuple[int, int]) -> None:
        assert kind == resource.RLIMIT_NOFILE
        if self._is_fixed:
            raise ValueError("not allowed to raise maximum limit")
        self.now = limits


def test_the_soft_limit_becomes_the_hard_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits = Limits(monkeypatch, 1024, 100_000)
    assert raise_open_files() == 100_000
    assert limits.now == (100_000, 100_000)
    assert not caplog.records


def test_a_limit_that_is_too_low_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Limits(monkeypatch, 256, 4096)
    assert raise_open_files() == 4096
    [record] = caplog.records
    assert "4096 files" in record.getMessage()
    assert "ulimit -Hn" in record.getMessage()


def test_a_limit_that_cannot_be_raised_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Limits(monkeypatch, 20_000, 2**31, is_fixed=True)
    assert raise_open_files() == 20_000
    assert "stays at 20000" in caplog.text


def test_no_limit_is_no_low_one(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    Limits(monkeypatch, resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    raise_open_files()
    assert not caplog.records
