"""Several API processes on one engine and one port: starts them, replaces those that die, ends them together.

The supervisor runs the engine process and owns the listening socket; it serves nothing itself. Each worker
accepts from the same socket, joins the engine under a name of its own, and gets its own outputs from it
directly. What all workers have to know of each other goes through here.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from server.admission import Admission
from server.config import ServerConfig
from server.engine_client import ZmqEngineClient
from server.metric_aliases import add_aliases
from server.metric_parts import kept_parts, summed_parts
from server.metrics import Metrics
from server.transport import Progress, Ready
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

_log = logging.getLogger(__name__)

# Workers that end this often within the time will end again: give up and say so.
_MAX_RESTARTS = 5
_RESTART_WINDOW_S = 60.0
_ANSWER_S = 1.0
_LOADING = EngineDown("the engine is not ready", is_final=False)


@dataclass(eq=False)
class _Worker:
    """One life of a worker process.

    Attributes:
        has_joined: it takes requests to the engine that runs.
        last_part: its metrics when it was asked last; they stay when it dies.
    """

    name: str
    process: asyncio.subprocess.Process
    line: WorkerLine
    is_serving: bool = False
    has_joined: bool = False
    last_part: bytes = b""


@dataclass(eq=False)
class _Asked:
    """A question on its way through the workers."""

    question: Question
    tell: Callable[[list[bytes]], None]
    missing: set[str]
    answers: list[bytes] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None


class WorkerSupervisor:
    """Runs the engine and ``config.api_workers`` workers until a signal, or until one of them cannot go on.

    Args:
        on_serving: all workers take requests to the engine, for the first time.
    """

    def __init__(
        self,
        config: ServerConfig,
        model_path: str,
        listener: socket.socket,
        *,
        module: str = "server.launch",
        on_progress: Callable[[Progress], None] = lambda progress: None,
        on_serving: Callable[[Ready], None] = lambda ready: None,
    ) -> None:
        self._config = config
        self._model_path = model_path
        self._listener = listener
        self._on_serving = on_serving
        self._ready: Ready | None = None
        self._has_served = False
        self._is_engine_up = False
        self._has_vocabulary = False
        self._workers: dict[str, _Worker] = {}
        self._asked: dict[tuple[str, int], _Asked] = {}
        self._numbers = itertools.count()
        self._established: dict[str, str] = {}
        self._retired = b""
        self._restarts: deque[float] = deque(maxlen=_MAX_RESTARTS)
        self._ending = asyncio.Event()
        self._failure: str | None = None
        self._engine = ZmqEngineClient(
            config,
            model_path,
            module=module,
            on_progress=on_progress,
            on_ready=self._on_engine_ready,
            on_end=self._on_engine_end,
            on_failure=self._fail,
        )
        self._metrics = Metrics(
            config.metrics_prefix,
            config.served_model_names[0],
            self._engine,
            Admission(config, self._engine),
        )
        add_aliases(self._metrics, config.served_model_names[0], config.metrics_compat)

    async def run(self) -> str | None:
        """Returns None after a signal, else why it could not go on."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.end, number)
        self._engine.start()
        try:
            await asyncio.gather(*map(self._keep_worker, range(self._config.api_workers)))
        finally:
            for worker in self._workers.values():
                worker.process.kill()
            await self._engine.stop()
        return self._failure

    def end(self, number: int) -> None:
        """Passes a signal on; the workers know what to do at a first and at a second one."""
        if not self._ending.is_set():
            self._ending.set()
            self._listener.close()  # so that nobody can connect once the last worker accepts no more
        for worker in self._workers.values():
            with contextlib.suppress(ProcessLookupError):
                worker.process.send_signal(number)

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        self._tell_all(EngineDown(reason, is_final=True))
        self.end(signal.SIGINT)

    # ---- the workers ----

    async def _keep_worker(self, index: int) -> None:
        life = 0
        while not self._ending.is_set():
            life += 1
            worker = await self._start_worker(f"api-{index}-{life}")
            await self._listen(worker)
            code = await worker.process.wait()
            worker.line.close()
            self._forget(worker)
            if self._ending.is_set():
                return
            now = time.monotonic()
            if len(self._restarts) == _MAX_RESTARTS and now - self._restarts[0] < _RESTART_WINDOW_S:
                self._fail(f"API processes end again and again, the last with status {code}")
                return
            self._restarts.append(now)
            _log.error("API process %d ended with status %d; starting it again", index, code)

    async def _start_worker(self, name: str) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            inherited = (theirs.fileno(), self._listener.fileno())
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "server.worker", *map(str, inherited), str(os.getpid()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=inherited,
                # ^C reaches the whole terminal: signals come from here, and from here only.
                start_new_session=True,
            )  # fmt: skip
        worker = self._workers[name] = _Worker(name, process, await WorkerLine.over(ours))
        worker.line.send(Begin(self._config, self._model_path, name))
        return worker

    async def _listen(self, worker: _Worker) -> None:
        while (message := await worker.line.receive()) is not None:
            match message:
                case Serving(vocabulary):
                    worker.is_serving = True
                    for subject, argument in self._established.items():  # nobody waits for the answer
                        worker.line.send(Question(next(self._numbers), "", subject, argument))
                    if not self._has_vocabulary:
                        self._has_vocabulary = True
                        self._engine.provide(vocabulary)
                    worker.line.send(self._engine_up() if self._is_engine_up else _LOADING)
                case Joined(address):  # of an engine that is gone, perhaps
                    worker.has_joined = self._is_engine_up and address == self._engine.address
                    self._tell_if_serving()
                case CannotServe(reason):
                    self._fail(reason)
                case EngineHangs():
                    self._engine.end_hung()
                case Question(number):
                    self._pass_on(message, partial(self._reply, worker, number))
                case Reply():
                    self._take(worker, message)
                case _:
                    raise ValueError(f"a supervisor does not take {type(message).__name__}")

    def _forget(self, worker: _Worker) -> None:
        del self._workers[worker.name]
        self._engine.forget(worker.name)
        if worker.last_part:
            kept = kept_parts(worker.last_part)
            self._retired = summed_parts(self._retired, kept) if self._retired else kept
        for asked in list(self._asked.values()):
            if asked.question.asker == worker.name:
                self._finish(asked)
            elif worker.name in asked.missing:
                asked.missing.discard(worker.name)
                self._finish_if_complete(asked)

    # ---- the engine ----

    def _engine_up(self) -> EngineUp:
        return EngineUp(self._engine.address, self._engine.num_restarts)

    def _on_engine_ready(self, ready: Ready) -> None:
        self._ready = ready
        self._is_engine_up = True
        self._tell_all(self._engine_up())

    def _on_engine_end(self, reason: str) -> None:
        self._is_engine_up = False
        for worker in self._workers.values():
            worker.has_joined = False
        self._tell_all(EngineDown(reason, is_final=False))

    def _tell_all(self, message: EngineUp | EngineDown) -> None:
        for worker in self._workers.values():
            if worker.is_serving:
                worker.line.send(message)

    def _tell_if_serving(self) -> None:
        num_joined = sum(worker.has_joined for worker in self._workers.values())
        if self._ready is not None and num_joined == self._config.api_workers and not self._has_served:
            self._has_served = True
            self._on_serving(self._ready)

    # ---- questions ----

    @property
    def engine(self) -> ZmqEngineClient:
        return self._engine

    async def ask(self, subject: str, argument: str = "") -> list[bytes]:
        """The answers of all workers that answer in time, to a question of this process."""
        waiting: asyncio.Future[list[bytes]] = asyncio.get_running_loop().create_future()
        self._pass_on(Question(next(self._numbers), "", subject, argument), waiting.set_result)
        return await asyncio.shield(waiting)

    async def establish(self, subject: str, argument: str) -> None:
        """Has all workers know something, those that start later too."""
        self._established[subject] = argument
        await self.ask(subject, argument)

    def _reply(self, asker: _Worker, number: int, answers: list[bytes]) -> None:
        asker.line.send(Replies(number, answers))

    def _pass_on(self, question: Question, tell: Callable[[list[bytes]], None]) -> None:
        serving = [worker for worker in self._workers.values() if worker.is_serving]
        asked = _Asked(question, tell, {worker.name for worker in serving})
        self._asked[question.asker, question.number] = asked
        if question.subject == "metrics":
            asked.answers.append(self._metrics.part(with_engine=True))
            if self._retired:
                asked.answers.append(self._retired)
        for worker in serving:  # the asker too, so that its numbers are known when it dies
            worker.line.send(question)
        asked.timer = asyncio.get_running_loop().call_later(_ANSWER_S, self._finish, asked)
        self._finish_if_complete(asked)

    def _take(self, worker: _Worker, reply: Reply) -> None:
        asked = self._asked.get((reply.asker, reply.number))
        if asked is None or worker.name not in asked.missing:
            return
        asked.missing.discard(worker.name)
        asked.answers.append(reply.answer)
        if asked.question.subject == "metrics":
            worker.last_part = reply.answer
        self._finish_if_complete(asked)

    def _finish_if_complete(self, asked: _Asked) -> None:
        if not asked.missing:
            self._finish(asked)

    def _finish(self, asked: _Asked) -> None:
        """Tells the asker what is known, which after a while is what those last said that say nothing now."""
        if self._asked.pop((asked.question.asker, asked.question.number), None) is None:
            return
        if asked.timer is not None:
            asked.timer.cancel()
        if asked.question.subject == "metrics":
            late = [self._workers[name].last_part for name in asked.missing if name in self._workers]
            asked.answers += [kept_parts(part) for part in late if part]
        asked.tell(asked.answers)
