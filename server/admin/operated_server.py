"""What an operator's hands reach: a server, of one API process or of several."""

from __future__ import annotations

import time
from typing import Any, Protocol

from scheduler.messages import StepPhase
from server.engine_protocol import EngineClient
from server.logs import log_level, set_log_level
from server.service import VERSION, Service


class OperatedEngine(EngineClient, Protocol):
    """An engine, and what operators ask of it."""

    async def flush_prefix_cache(self) -> int:
        """Forgets all prefixes; returns the number of their blocks. Raises EngineDeadError."""
        ...

    async def profile(self, num_steps: int, seconds: float) -> tuple[StepPhase, ...]:
        """The phases of the next steps, of fewer if they take longer than so many seconds.

        Raises:
            EngineDeadError: the engine is not there, or ends meanwhile.
            ProfileRunningError: one is being taken.
        """
        ...

    def set_log_level(self, level: str) -> None:
        """Of this engine and those that come after it."""
        ...


class OperatedServer(Protocol):
    """A server as its operators see it."""

    @property
    def engine(self) -> OperatedEngine: ...

    async def status(self) -> dict[str, Any]:
        """How it is, as a JSON object."""
        ...

    async def take_requests(self, takes: bool) -> None:
        """Whether new requests are taken; those that run or wait go on to their end."""
        ...

    async def requests(self) -> list[dict[str, Any]]:
        """The calls that wait or run, as JSON objects."""
        ...

    async def abort(self, request_id: str) -> list[str]:
        """Ends the calls with this id; returns the ids of their answers."""
        ...

    async def set_log_level(self, level: str) -> None:
        """Of all processes."""
        ...


class LoneServer:
    """One API process and its engine."""

    def __init__(self, service: Service, engine: OperatedEngine) -> None:
        self._service = service
        self.engine = engine

    async def status(self) -> dict[str, Any]:
        service = self._service
        shown = service_status(service)
        shown["waiting"] += self.engine.stats.num_waiting
        return shared_status(service.config.served_model_names, service.began, self.engine) | shown

    async def take_requests(self, takes: bool) -> None:
        self._service.takes_requests = takes

    async def requests(self) -> list[dict[str, Any]]:
        return self._service.running.as_json()

    async def abort(self, request_id: str) -> list[str]:
        return self._service.running.abort(request_id)

    async def set_log_level(self, level: str) -> None:
        set_log_level(level)
        self.engine.set_log_level(level)


def shared_status(names: tuple[str, ...], began: float, engine: EngineClient) -> dict[str, Any]:
    """What all API processes of a server have in common."""
    return {
        "version": VERSION,
        "models": names,
        "uptime_seconds": int(time.monotonic() - began),
        "is_engine_ready": engine.is_ready,
        "running": engine.stats.num_running,
        "kv_cache_usage": round(engine.stats.kv_cache_usage, 4),
        "engine_restarts": engine.num_restarts,
        "log_level": log_level(),
    }


def service_status(service: Service) -> dict[str, Any]:
    """What each API process knows for itself. ``waiting`` is in its line, not in the engine's."""
    return {
        "is_ready": service.is_ready,
        "takes_requests": service.takes_requests,
        "is_shutting_down": service.is_draining,
        "calls": len(service.running),
        "waiting": service.admission.num_waiting,
    }
