"""Ways to talk to an application in the tests: in process, and over a real socket."""

from __future__ import annotations

import asyncio
import functools
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn
from fastapi import FastAPI

from server.app import create_app
from server.config import ServerConfig
from server.engine_protocol import EngineClient
from server.http_protocol import HttpProtocol
from server.listening import listen
from server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from server.tracing import Traces

MODEL = "smollm2-135m-instruct"


@asynccontextmanager
async def api(
    engine: EngineClient,
    tokenizer: Tokenizer,
    config: ServerConfig | None = None,
    traces: Traces | None = None,
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application in this process. Responses come whole."""
    app = create_app(config or ServerConfig(), engine, tokenizer, traces)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client
    finally:
        await app.state.service.close()


@asynccontextmanager
async def serving(app: FastAPI, **settings: Any) -> AsyncIterator[int]:
    """Serves an application with uvicorn on a free port of this machine, which it yields."""
    with listen(ServerConfig(port=0)) as listener:
        async with serving_at(listener, app, **settings):
            yield listener.getsockname()[1]


@asynccontextmanager
async def serving_at(listener: socket.socket, app: FastAPI, **settings: Any) -> AsyncIterator[uvicorn.Server]:
    """Serves an application with uvicorn on a socket that listens, behind its doorman if it has one."""
    doorman = getattr(app.state, "doorman", None) if isinstance(app, FastAPI) else None
    protocol = functools.partial(HttpProtocol, doorman=doorman)
    ours: dict[str, Any] = {"http": protocol, "lifespan": "off", "log_config": None, "ws": "none"}
    server = uvicorn.Server(uvicorn.Config(app, **ours | settings))
    task = asyncio.create_task(server.serve([listener]))
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.005)
    try:
        yield server
    finally:
        server.should_exit = True
        server.force_exit = True
        await task


def events(body: str) -> list[Any]:
    """The data of a stream's events, parsed; ``[DONE]`` stays text."""
    assert body.endswith("\n\n")
    lines = [line for event in body[:-2].split("\n\n") for line in event.split("\n")]
    data = [line.removeprefix("data: ") for line in lines if not line.startswith(":")]
    return [text if text == "[DONE]" else json.loads(text) for text in data]


def named_events(body: str) -> list[tuple[str, dict[str, Any]]]:
    """The name and the data of each event of a stream."""
    events = []
    for event in body.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def chat(content: Any = "Hi", **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}
