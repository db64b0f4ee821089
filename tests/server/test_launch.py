from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from scheduler.messages import EngineOutput, Request
from server import launch
from server.app import create_app
from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.server.http_client import serving_at
from tests.server.in_process_engine import ScriptedEngine


@pytest.mark.parametrize(
    ("parent_id", "lives"),
    [
        (1, True),  # in a container the API process is often process 1
        (4242, False),  # the parent has died: another process has adopted us
    ],
)
def test_the_engine_does_not_outlive_the_process_that_started_it(parent_id: int, lives: bool) -> None:
    script = (
        "import os; os.getppid = lambda: 1; from server.launch import follow_parent; "
        f"follow_parent({parent_id}); print('lives')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout.strip() == "lives") is lives
    assert done.returncode == (0 if lives else 1)


async def test_a_connection_whose_client_stops_reading_is_dropped(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(request: Request) -> Iterator[EngineOutput]:
        while True:
            yield EngineOutput(request.request_id, (28,) * 8192)

    monkeypatch.setattr(launch, "_UNSENT_TIMEOUT_MS", 500)
    engine = ScriptedEngine(endless)
    app = create_app(ServerConfig(), engine, tokenizer)
    body = b'{"prompt":"x","stream":true}'
    with launch.listen(ServerConfig(port=0)) as listener:
        async with serving_at(listener, app) as server:
            with socket.create_connection(listener.getsockname()) as client:
                client.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
                )
                async with asyncio.timeout(15):
                    while not engine.aborted or server.server_state.connections:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
