"""A server of several API processes, as its operators see it: what is asked goes to all of them."""

from __future__ import annotations

import time
from typing import Any, Protocol

import msgspec

from server.admin.operated_server import OperatedEngine, service_status, shared_status
from server.logs import set_log_level
from server.service import Service


class Supervisor(Protocol):
    """What it takes of the supervisor of the workers."""

    @property
    def engine(self) -> OperatedEngine: ...

    async def ask(self, subject: str, argument: str = "") -> list[bytes]:
        """The answers of all workers that answer in time."""
        ...

    async def establish(self, subject: str, argument: str) -> None:
        """The same; those that start later are told too."""
        ...


class OperatedWorkers:
    """A supervisor, its workers and its engine."""

    def __init__(self, supervisor: Supervisor, names: tuple[str, ...]) -> None:
        self._supervisor = supervisor
        self._names = names
        self._began = time.monotonic()
        self._takes_requests = True

    @property
    def engine(self) -> OperatedEngine:
        return self._supervisor.engine

    async def status(self) -> dict[str, Any]:
        workers = [msgspec.json.decode(answer) for answer in await self._supervisor.ask("status")]
        engine = self.engine
        return shared_status(self._names, self._began, engine) | {
            "is_ready": bool(workers) and all(worker["is_ready"] for worker in workers),
            "takes_requests": self._takes_requests,
            "is_shutting_down": any(worker["is_shutting_down"] for worker in workers),
            "calls": sum(worker["calls"] for worker in workers),
            "waiting": sum(worker["waiting"] for worker in workers) + engine.stats.num_waiting,
            "api_workers": len(workers),
        }

    async def take_requests(self, takes: bool) -> None:
        self._takes_requests = takes
        await self._supervisor.establish("take_requests", "yes" if takes else "no")

    async def requests(self) -> list[dict[str, Any]]:
        calls = [
            call for answer in await self._supervisor.ask("requests") for call in msgspec.json.decode(answer)
        ]
        return sorted(calls, key=lambda call: -float(call["age_seconds"]))

    async def abort(self, request_id: str) -> list[str]:
        answers = await self._supervisor.ask("abort", request_id)
        return [call_id for answer in answers for call_id in msgspec.json.decode(answer, type=list[str])]

    async def set_log_level(self, level: str) -> None:
        set_log_level(level)
        self.engine.set_log_level(level)
        await self._supervisor.establish("log_level", level)


def answer_operator(service: Service, subject: str, argument: str) -> bytes:
    """A worker's answer to what an operator asks of all of them."""
    match subject:
        case "status":
            return msgspec.json.encode(service_status(service))
        case "take_requests":
            service.takes_requests = argument == "yes"
        case "requests":
            return msgspec.json.encode(service.running.as_json())
        case "abort":
            return msgspec.json.encode(service.running.abort(argument))
        case "log_level":
            set_log_level(argument)
    return b""
