"""Composition root: puts the API process and the engine process together.

``python -m server.launch ADDRESS PARENT_ID`` is how the API process starts the engine process. The two sides
import their own halves only, inside the functions below: the engine knows no FastAPI, the API process no
ONNX Runtime.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import gc
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from server.config import ServerConfig
from server.listening import (
    LaunchError,
    check_certificate,
    listen,
    listen_for_admin,
    unlinked_at_last,
    url_of,
)
from server.logs import configure_logging
from server.model_source import ModelSource, find_model
from server.open_files import raise_open_files
from server.otlp_settings import TracesError, traces_endpoint

if TYPE_CHECKING:
    from server.http_server import HttpServer

_log = logging.getLogger(__name__)
FAULTS_VARIABLE = "INFLIGHTD_FAULTS"
_ENGINE_NICENESS = 5


def serve(config: ServerConfig, notes: Sequence[str] = ()) -> None:
    """Serves until SIGINT or SIGTERM. ``notes`` go to the log first.

    Raises:
        LaunchError, ModelSourceError: before anything is served, with a message for the user.
    """
    import uvloop

    configure_logging(config.log_level, config.log_format)
    for note in notes:
        _log.info("%s", note)
    check_certificate(config)
    raise_open_files()
    try:
        endpoint = traces_endpoint(config.otlp_traces_endpoint, os.environ)
    except TracesError as error:
        raise LaunchError(str(error)) from None
    config = dataclasses.replace(config, otlp_traces_endpoint=endpoint)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen(config))
        stack.enter_context(unlinked_at_last(config.uds))
        admin_listener = listen_for_admin(config)
        if admin_listener is not None:
            stack.enter_context(admin_listener)
            stack.enter_context(unlinked_at_last(config.admin_uds))
        source = find_model(config.model)
        config = dataclasses.replace(config, served_model_name=config.served_model_name or (source.name,))
        if config.api_workers == 1:
            uvloop.run(_serve(config, source, listener, admin_listener))
            return
        with _shared_responses(config) as config:
            uvloop.run(_serve_by_workers(config, source, listener, admin_listener))


async def _serve(
    config: ServerConfig,
    source: ModelSource,
    listener: socket.socket,
    admin_listener: socket.socket | None,
) -> None:
    from server.console import Console
    from server.engine_client import ZmqEngineClient

    started = time.monotonic()
    console = Console(source.name, url_of(config, listener), started, uds=config.uds)
    loop = asyncio.get_running_loop()
    failed = asyncio.Event()
    failures: list[str] = []

    def on_failure(reason: str) -> None:
        failures.append(reason)
        failed.set()

    engine = ZmqEngineClient(
        config,
        str(source.path),
        on_progress=console.show_progress,
        on_ready=console.show_ready,
        on_failure=on_failure,
    )
    engine.start()
    try:
        # While the engine imports and loads, this process does the same with its own half.
        from server.api_process import Ending, http_server, load_application, traces_of

        traces = traces_of(config)
        app, tokenizer = await load_application(config, source.path, engine, traces)
        engine.provide(tokenizer.vocabulary)
        server = http_server(config, app)
        ending = Ending(server, app.state.service, config)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ending.signal, number)
        watchers = [
            asyncio.create_task(_exit_on(failed, server)),
            asyncio.create_task(app.state.service.metrics.operation.watch_loop()),
        ]
        async with contextlib.AsyncExitStack() as stack:
            if admin_listener is not None:
                from server.admin.admin_server import administered
                from server.admin.operated_server import LoneServer

                operated = LoneServer(app.state.service, engine)
                await stack.enter_async_context(administered(config, operated, admin_listener))
            await server.serve(sockets=[listener])
        for watcher in watchers:
            watcher.cancel()
        await app.state.service.close()
        if traces is not None:
            await traces.close()
    finally:
        await engine.stop()
    if failures:
        raise LaunchError(failures[0])


@contextlib.contextmanager
def _shared_responses(config: ServerConfig) -> Iterator[ServerConfig]:
    """Several processes keep responses in one file; if none is named, in one that goes with the server."""
    if config.responses_db is not None:
        yield config
        return
    with tempfile.TemporaryDirectory(prefix="inflightd-responses-") as directory:
        yield dataclasses.replace(config, responses_db=str(Path(directory) / "responses.db"))


async def _serve_by_workers(
    config: ServerConfig,
    source: ModelSource,
    listener: socket.socket,
    admin_listener: socket.socket | None,
) -> None:
    from server.console import Console
    from server.worker_supervisor import WorkerSupervisor

    console = Console(source.name, url_of(config, listener), time.monotonic(), uds=config.uds)
    supervisor = WorkerSupervisor(
        config,
        str(source.path),
        listener,
        on_progress=console.show_progress,
        on_serving=console.show_ready,
    )
    async with contextlib.AsyncExitStack() as stack:
        if admin_listener is not None:
            from server.admin.admin_server import administered
            from server.admin.operated_workers import OperatedWorkers

            operated = OperatedWorkers(supervisor, config.served_model_names)
            await stack.enter_async_context(administered(config, operated, admin_listener))
        failure = await supervisor.run()
    if failure:
        raise LaunchError(failure)


async def _exit_on(failed: asyncio.Event, server: HttpServer) -> None:
    await failed.wait()
    server.end()


def run_engine(address: str, parent_id: int) -> int:
    """The engine process: loads what the first message says, then steps until it is told to quit.

    Args:
        parent_id: the process id of the API process, which this process does not outlive.
    """
    follow_parent(parent_id)
    # On a CPU the threads that compute take every core. The API process needs little, but soon: refusals and
    # health probes must not wait for them. Where sessions or containers share a machine, the kernel compares
    # priorities inside of them only, so that others gain nothing by it.
    os.nice(_ENGINE_NICENESS)
    # ^C reaches the whole terminal; the API process drains first and then says QUIT.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    from server.transport import EngineEnd, Kind, Ready

    end = EngineEnd(address)
    try:
        kind, start = end.receive()
        if kind is not Kind.START:
            raise ValueError(f"the first message was {kind.name}, not START")
        configure_logging(start.config.log_level, start.config.log_format)

        from engine_runtime.factory import (
            CheckpointError,
            DeviceError,
            MemoryPlanError,
            RuntimeConfig,
            create_executor,
        )
        from engine_runtime.grammars.matchers import GrammarMatchers
        from scheduler.engine_core import EngineCore
        from scheduler.executor import Executor, ExecutorLostError
        from scheduler.faults import FaultsError, FaultyExecutor, parse_faults

        config: ServerConfig = start.config
        began = time.monotonic()
        executor: Executor
        try:
            faults = parse_faults(os.environ.get(FAULTS_VARIABLE, "")) if config.debug_faults else ()
            executor, plan = create_executor(
                RuntimeConfig(
                    model_path=Path(start.model_path),
                    device=config.device,
                    dtype=config.dtype,
                    quantization=config.quantization,
                    kv_cache_dtype=config.kv_cache_dtype,
                    max_model_len=config.max_model_len,
                    kv_cache_bytes=config.kv_cache_bytes,
                    gpu_memory_utilization=config.gpu_memory_utilization,
                    max_num_seqs=config.max_num_seqs,
                    max_num_batched_tokens=config.max_num_batched_tokens,
                    block_size=config.block_size,
                    num_threads=config.threads,
                ),
                end.progress(),
            )
        except (CheckpointError, DeviceError, MemoryPlanError, FaultsError) as error:
            end.send(Kind.FAILED, str(error))
            return 1
        if faults:
            _log.warning("faults are injected, since --debug-faults is on: %s", faults)
            executor = FaultyExecutor(executor, faults)
        grammars = GrammarMatchers(executor.spec.vocab_size, end.wake)
        core = EngineCore(executor, grammars)
        # What was loaded stays: the collector need not walk it again in the middle of a step.
        gc.collect()
        gc.freeze()
        end.send(Kind.READY, Ready(executor.spec, plan.table(), time.monotonic() - began))
        try:
            end.run(core, grammars.learn, grammars.warm_up)
        except ExecutorLostError as error:
            _log.critical("the engine ends: %s", error)
            logging.shutdown()
            end.close()
            os._exit(1)  # what a lost device does to those who tidy up, nobody knows
        core.shutdown()
    finally:
        end.close()
    return 0


def follow_parent(parent_id: int) -> None:
    """Has the kernel end this process when the API process dies, however it dies (Linux, prctl(2))."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent_id:  # it was gone before we asked
        os._exit(1)


if __name__ == "__main__":
    sys.exit(run_engine(sys.argv[1], int(sys.argv[2])))
