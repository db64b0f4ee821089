"""What the API process does for a streamed token in Python, from the engine's message to the socket.

    python -m tests.benchmarks.stream_path [--streams 256] [--tokens 200]

No engine, no socket and no kernel: the messages are made beforehand, and what is written is counted and
thrown away. Everything between is the product's. Process CPU, five fifths of the run, the least of which
varies by a few percent even on a busy machine; ``front_end`` has the whole, and varies by half.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import time
from typing import Any

import uvloop
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from scheduler.messages import EngineOutput, EngineOutputs, EngineStats, ExecutorSpec
from server.app import create_app
from server.chat_form import ChatForm
from server.config import ServerConfig
from server.engine_link import EngineLink
from server.guard import SEND_BODY
from server.http_protocol import WRITE_CHUNK, ChunkWriter
from server.model_source import fetch_default_model
from server.service import Service
from server.sse import EventStream
from server.tokenizer import load_tokenizer
from server.transport import Kind, Ready, decode, encode

_TEXT = " The quick brown fox jumps over the lazy dog"
_SPEC = ExecutorSpec("none", 49_152, 16, 100_000, 8192, 1024, 8192, "none")


class _Line:
    """Takes requests, and gives what was put in."""

    def __init__(self) -> None:
        self.request_ids: list[str] = []
        self._messages: asyncio.Queue[list[bytes]] = asyncio.Queue()

    def send(self, kind: Kind, body: Any = None) -> None:
        if kind is Kind.REQUEST:
            self.request_ids.append(body.request_id)

    def put(self, kind: Kind, body: object) -> None:
        self._messages.put_nowait(list(encode(kind, body)))

    async def receive(self) -> tuple[Kind, Any]:
        return decode(await self._messages.get())


class _Link(EngineLink):
    """Reads from such a line for ever."""

    def __init__(self, line: Any) -> None:
        super().__init__()
        self._connection = line
        self.reading = asyncio.create_task(self._read(line))


class _Sink:
    """A transport that counts what is written."""

    num_writes = 0

    def write(self, data: bytes) -> None:
        _Sink.num_writes += 1

    def is_closing(self) -> bool:
        return False


def _connection() -> tuple[dict[str, Any], RequestResponseCycle]:
    """The scope of a request and uvicorn's side of it."""
    sink: Any = _Sink()
    scope: Any = {"type": "http", "method": "POST", "path": "/v1/chat/completions"}
    log = logging.getLogger(__name__)
    cycle = RequestResponseCycle(
        scope, sink, FlowControl(sink), log, log, False, [], asyncio.Event(), False, True, lambda: None
    )
    scope[SEND_BODY] = cycle.send
    scope[WRITE_CHUNK] = ChunkWriter(cycle)
    return scope, cycle


async def measure(num_streams: int, num_tokens: int) -> list[float]:
    """CPU seconds a token, of each fifth of the run."""
    tokenizer = load_tokenizer(fetch_default_model())
    line = _Line()
    link = _Link(line)
    line.put(Kind.READY, Ready(_SPEC, "none", 0.0))
    while not link.is_ready:  # noqa: ASYNC110 - set-up
        await asyncio.sleep(0)
    service: Service = create_app(
        ServerConfig(max_queued_requests=num_streams), link, tokenizer
    ).state.service
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": num_tokens + 1}
    streams = []
    for _ in range(num_streams):
        call = await service.validator.chat(dict(body), 200)
        answer = service.answer_to(call, ChatForm(call, tokenizer, "none"))
        scope, cycle = _connection()
        response = EventStream(answer.events(), "none")
        streams.append(asyncio.create_task(response(scope, cycle.receive, cycle.send)))
    while len(line.request_ids) < num_streams:  # noqa: ASYNC110 - set-up
        await asyncio.sleep(0)
    token_ids = tokenizer.encode(_TEXT)
    gc.collect()
    gc.freeze()
    seconds = []
    for fifth in range(5):
        messages = [
            EngineOutputs(
                tuple(EngineOutput(i, (token_ids[n % len(token_ids)],)) for i in line.request_ids),
                EngineStats(steps_total=fifth * num_tokens + n),
            )
            for n in range(num_tokens // 5)
        ]
        frames = [list(encode(Kind.OUTPUTS, message)) for message in messages]
        began = time.process_time()
        for frame in frames:
            expected = _Sink.num_writes + num_streams
            line._messages.put_nowait(frame)
            while _Sink.num_writes < expected:  # noqa: ASYNC110 - what is measured
                await asyncio.sleep(0)
        seconds.append((time.process_time() - began) / len(frames) / num_streams)
    for stream in (*streams, link.reading):
        stream.cancel()
    await asyncio.gather(*streams, link.reading, return_exceptions=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Python's share of the cost of a streamed token.")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200, help="of each stream")
    arguments = parser.parse_args()
    seconds = uvloop.run(measure(arguments.streams, arguments.tokens))
    shown = " ".join(f"{each * 1e6:.1f}" for each in seconds)
    print(f"{min(seconds) * 1e6:.1f} us a token (fifths: {shown})")


if __name__ == "__main__":
    main()
