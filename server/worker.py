"""One of several API processes on one port: ``python -m server.worker LINE LISTENER PARENT_ID``.

The supervisor (``worker_supervisor``) starts it with two open sockets: its line, and the one on which all of
them accept connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from pathlib import Path

from server.admin.operated_workers import answer_operator
from server.api_process import Ending, http_server, load_application, traces_of
from server.engine_link import EngineLink
from server.launch import follow_parent
from server.listening import LaunchError
from server.logs import configure_logging
from server.peers import WorkerPeers
from server.service import Service
from server.transport import ApiEnd, Kind, Ready
from server.worker_line import (
    Begin,
    CannotServe,
    EngineDown,
    EngineHangs,
    EngineUp,
    Joined,
    Question,
    Replies,
    Reply,
    Serving,
    WorkerLine,
)

_ENGINE_PATIENCE_S = 2.0


class WorkerEngine(EngineLink):
    """The engine that the supervisor runs, joined by this process."""

    def __init__(self, name: str, line: WorkerLine) -> None:
        super().__init__()
        self._name = name
        self._line = line
        self._address = ""
        self._tasks: list[asyncio.Task[None]] = []
        # Whether it is known how the engine is: ready, or not up.
        self.is_known = asyncio.Event()

    def join(self, up: EngineUp) -> None:
        if self._connection is not None:
            self.leave(EngineDown("another one is up", is_final=False))
        self.num_restarts = up.num_restarts
        self._address = up.address
        connection = self._connection = ApiEnd(up.address, self._name)
        connection.send(Kind.JOIN)
        self._tasks = [
            asyncio.create_task(self._read(connection)),
            asyncio.create_task(self._watch(lambda: self._line.send(EngineHangs()))),
        ]

    def leave(self, down: EngineDown) -> None:
        """There is no engine now. What was worked on waits for the next one, if there will be one."""
        self.is_known.set()
        if self._connection is None:
            if down.is_final:
                self._give_up(down.reason)
            return
        for task in self._tasks:
            task.cancel()
        self._connection.close()
        self._connection = None
        self._is_ready = self._is_late = False
        self._keep_streams(down.reason)
        if down.is_final:
            self._give_up(down.reason)

    def _on_ready(self, ready: Ready) -> None:
        self.is_known.set()
        self._line.send(Joined(self._address))


async def serve(line_fd: int, listener_fd: int) -> int:
    """Serves until a signal says otherwise; returns the exit status."""
    line = await WorkerLine.over(socket.socket(fileno=line_fd))
    begin = await line.receive()
    if not isinstance(begin, Begin):
        return 1
    config = begin.config
    configure_logging(config.log_level, config.log_format)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    engine = WorkerEngine(begin.name, line)
    traces = traces_of(config)
    try:
        app, tokenizer = await load_application(config, Path(begin.model_path), engine, traces)
    except LaunchError as error:
        line.send(CannotServe(str(error)))
        line.close()
        return 1
    service: Service = app.state.service
    service.peers = peers = WorkerPeers(line, begin.name)
    server = http_server(config, app)
    ending = Ending(server, service, config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ending.signal, number)
    tasks = [
        asyncio.create_task(_listen(line, engine, service, peers)),
        asyncio.create_task(service.metrics.operation.watch_loop()),
    ]
    line.send(Serving(tokenizer.vocabulary))
    # One that comes later than the engine must not refuse what the others would take.
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(engine.is_known.wait(), _ENGINE_PATIENCE_S)
    await server.serve(sockets=[socket.socket(fileno=listener_fd)])
    for task in tasks:
        task.cancel()
    await service.close()
    if traces is not None:
        await traces.close()
    engine.leave(EngineDown("the server is shutting down", is_final=True))
    line.close()
    return 0


async def _listen(line: WorkerLine, engine: WorkerEngine, service: Service, peers: WorkerPeers) -> None:
    answers: set[asyncio.Task[None]] = set()
    while (message := await line.receive()) is not None:
        match message:
            case EngineUp():
                engine.join(message)
            case EngineDown():
                engine.leave(message)
            case Replies():
                peers.take(message)
            case Question():
                task = asyncio.create_task(_answer(line, message, service))
                answers.add(task)
                task.add_done_callback(answers.discard)
            case _:
                raise ValueError(f"a worker does not take {type(message).__name__}")


async def _answer(line: WorkerLine, asked: Question, service: Service) -> None:
    answer = b""
    match asked.subject:
        case "metrics":
            answer = service.metrics.part(with_engine=False)
        case "is_running":
            answer = b"yes" if service.background.is_running(asked.argument) else b""
        case "cancel":
            await service.background.cancel(asked.argument)
        case "idempotency":
            answer = service.kept_answers.told(asked.argument)
        case _:
            answer = answer_operator(service, asked.subject, asked.argument)
    line.send(Reply(asked.number, asked.asker, answer))


def main(line_fd: int, listener_fd: int, parent_id: int) -> int:
    import uvloop

    follow_parent(parent_id)
    with contextlib.suppress(KeyboardInterrupt):
        return uvloop.run(serve(line_fd, listener_fd))
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:4])))
