"""The API process of ``front_end``: the product's own parts, with a ``paced_engine`` behind them."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import resource
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import uvloop

from server.config import ServerConfig
from server.model_source import fetch_default_model
from tests.benchmarks.child_process import STOP, asked

_PROBE_EVERY_S = 0.005
_ENGINE = "tests.benchmarks.paced_engine"


@dataclass(frozen=True)
class Usage:
    """What the API process has used since it started, and how late its loop was since the last look."""

    user_seconds: float
    system_seconds: float
    num_tokens: int
    rss_bytes: int
    lags: tuple[float, ...] = ()


def serve_api(answers: Connection, config: ServerConfig) -> None:
    """Serves until told to stop; tells its port first, then its ``Usage`` whenever it is asked."""
    logging.basicConfig(level=logging.CRITICAL)  # streams that are cut off at the end are no news
    uvloop.run((_serve_alone if config.api_workers == 1 else _serve_by_workers)(answers, config))


async def _serve_alone(answers: Connection, config: ServerConfig) -> None:
    from server.api_process import http_server, load_application
    from server.engine_client import ZmqEngineClient
    from server.listening import listen

    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    model = fetch_default_model()
    engine = ZmqEngineClient(config, str(model), module=_ENGINE, on_ready=lambda _: ready.set())
    engine.start()
    app, _ = await load_application(config, model, engine, None)
    server = http_server(config, app)
    listener = listen(config)
    lags: list[float] = []

    def probe(due: float) -> None:
        now = loop.time()
        lags.append(now - due)
        loop.call_later(_PROBE_EVERY_S, probe, now + _PROBE_EVERY_S)

    def answer() -> None:
        if asked(answers) == STOP:
            server.end(at_once=True)
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        with open("/proc/self/statm") as file:
            rss = int(file.read().split()[1]) * resource.getpagesize()
        tokens = app.state.service.metrics.generation_tokens
        answers.send(Usage(used.ru_utime, used.ru_stime, tokens, rss, tuple(lags)))
        lags.clear()

    await ready.wait()
    loop.add_reader(answers.fileno(), answer)
    probe(loop.time())
    answers.send(listener.getsockname()[1])
    await server.serve(sockets=[listener])
    await app.state.service.close()
    await engine.stop()


async def _serve_by_workers(answers: Connection, config: ServerConfig) -> None:
    from server.listening import listen
    from server.worker_supervisor import WorkerSupervisor

    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    listener = listen(config)
    port = listener.getsockname()[1]
    model = str(fetch_default_model())
    supervisor = WorkerSupervisor(
        config, model, listener, module=_ENGINE, on_serving=lambda _: ready.set()
    )  # fmt: skip
    running = asyncio.create_task(supervisor.run())
    await ready.wait()
    answers.send(port)
    while await loop.run_in_executor(None, asked, answers) != STOP:
        answers.send(_usage_of_workers(int(await metric(port, "generation_tokens_total"))))
    supervisor.end(signal.SIGTERM)
    supervisor.end(signal.SIGTERM)
    await running


def _usage_of_workers(num_tokens: int) -> Usage:
    """CPU of all processes that serve, to a hundredth of a second each; the loops' lateness is not known."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    ticks, pages = [0, 0], 0
    for pid in children:
        if b"server.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks = [ticks[0] + int(fields[11]), ticks[1] + int(fields[12])]
            pages += int(fields[21])
    user, system = (each / os.sysconf("SC_CLK_TCK") for each in ticks)
    return Usage(user, system, num_tokens, pages * resource.getpagesize())


async def metric(port: int, name: str) -> float:
    """The value of a metric of the server."""
    async with httpx.AsyncClient(timeout=60) as client:  # behind thousands of connections, if need be
        page = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
    found = re.search(rf"^inflightd:{name}\S* (\S+)$", page, re.MULTILINE)
    assert found is not None, f"{name} is not in /metrics"
    return float(found[1])
