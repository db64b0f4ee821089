"""When a server of several API processes says that it serves; the end-to-end tests run one."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from scheduler.messages import ExecutorSpec, Vocabulary
from server.config import ServerConfig
from server.transport import Ready
from server.worker_line import EngineDown, EngineUp, Joined, Message, Serving
from server.worker_supervisor import WorkerSupervisor, _Worker

READY = Ready(ExecutorSpec("a model", 4, 16, 8, 64, 2, 64, "cpu"), "a plan", 1.0)
SERVING = Serving(Vocabulary("{}", ()))


class Line:
    """What a worker is told is kept, and it says what it is given to say."""

    def __init__(self) -> None:
        self.told: list[Message] = []
        self._said: asyncio.Queue[Message] = asyncio.Queue()

    def send(self, message: Message) -> None:
        self.told.append(message)

    async def receive(self) -> Message:
        return await self._said.get()

    async def say(self, message: Message) -> None:
        self._said.put_nowait(message)
        await asyncio.sleep(0)
        await asyncio.sleep(0)


@pytest.fixture
def served() -> list[Ready]:
    return []


@pytest.fixture
def supervisor(served: list[Ready]) -> WorkerSupervisor:
    config = ServerConfig(api_workers=2)
    listener = socket.socket()
    listener.close()
    made = WorkerSupervisor(config, "a model", listener, on_serving=served.append)
    made.engine.address = "first engine"
    made.engine.provide = lambda vocabulary: None  # type: ignore[method-assign]
    return made


def workers_of(supervisor: WorkerSupervisor) -> tuple[Line, Line, list[asyncio.Task[None]]]:
    lines, tasks = (Line(), Line()), []
    for index, line in enumerate(lines):
        process: Any = None
        on_line: Any = line
        worker = supervisor._workers[f"api-{index}-1"] = _Worker(f"api-{index}-1", process, on_line)
        tasks.append(asyncio.create_task(supervisor._listen(worker)))
    return *lines, tasks


async def test_it_serves_once_all_workers_have_joined_the_engine(
    supervisor: WorkerSupervisor, served: list[Ready]
) -> None:
    first, second, tasks = workers_of(supervisor)
    await first.say(SERVING)
    assert [type(message) for message in first.told] == [EngineDown]
    supervisor._on_engine_ready(READY)
    assert isinstance(first.told[-1], EngineUp)
    await second.say(SERVING)
    assert isinstance(second.told[-1], EngineUp)
    await first.say(Joined("first engine"))
    assert served == []  # a request that the second one takes now would be refused
    await second.say(Joined("first engine"))
    assert served == [READY]
    await second.say(Joined("first engine"))
    assert served == [READY]
    for task in tasks:
        task.cancel()


async def test_an_engine_that_ended_before_it_was_joined_by_all_does_not_count(
    supervisor: WorkerSupervisor, served: list[Ready]
) -> None:
    first, second, tasks = workers_of(supervisor)
    for line in (first, second):
        await line.say(SERVING)
    supervisor._on_engine_ready(READY)
    await first.say(Joined("first engine"))
    supervisor._on_engine_end("it was killed")
    await second.say(Joined("first engine"))  # on its way when the engine ended
    supervisor.engine.address = "second engine"
    supervisor._on_engine_ready(READY)
    await first.say(Joined("second engine"))
    await second.say(Joined("first engine"))  # on its way for even longer
    assert served == []
    await second.say(Joined("second engine"))
    assert served == [READY]
    for task in tasks:
        task.cancel()
