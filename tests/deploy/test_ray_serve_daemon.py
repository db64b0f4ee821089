"""The process beside a replica, without Ray: its start, its end, and requests on their way to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.ray_serve import daemon as daemon_module
from deploy.ray_serve.daemon import Daemon, DaemonLostError
from deploy.ray_serve.messages import ProxiedRequest, end_to_end

# Listens where the daemon would; tells what it was asked, and takes half a second for /slow.
_SERVER = """\
import http.server, json, signal, socketserver, sys, threading, time

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"target": self.path, "note": self.headers["x-note"]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.path == "/slow":
            time.sleep(0.3)
        self.wfile.write(body)

    def address_string(self):
        return "client"

    def log_message(self, *parts):
        pass

class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = False

server = Server(sys.argv[-1], Handler)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever(0.05)
server.server_close()
"""


def _folder(daemon: Daemon) -> Path:
    return Path(daemon._folder.name)


@pytest.fixture
async def daemon(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Daemon]:
    monkeypatch.setattr(daemon_module, "_PROGRAM", _SERVER)
    daemon = Daemon([])
    await daemon.start(20)
    yield daemon
    await daemon.stop(5)


async def _told(daemon: Daemon, **fields: Any) -> dict[str, Any]:
    request = ProxiedRequest(**{"method": "GET", "target": b"/", "headers": (), "body": b"", **fields})
    answer: dict[str, Any] = json.loads((await daemon.client.send(daemon.request(request))).content)
    return answer


@pytest.mark.parametrize("target", [b"/a%zz?x=%7e&y", b"*"])
async def test_a_target_arrives_as_it_was_written(daemon: Daemon, target: bytes) -> None:
    assert (await _told(daemon, target=target))["target"].encode() == target


async def test_blanks_behind_a_value_stay_behind(daemon: Daemon) -> None:
    assert (await _told(daemon, headers=end_to_end(((b"X-Note", b"a b \t"),))))["note"] == "a b"


async def test_a_request_may_end_before_the_daemon_does(daemon: Daemon) -> None:
    request = daemon.request(ProxiedRequest("GET", b"/slow", (), b""))
    response = await daemon.client.send(request, stream=True)
    body = asyncio.create_task(response.aread())
    await daemon.stop(5)
    assert json.loads(await body)["target"] == "/slow"


@pytest.mark.parametrize(
    ("program", "message"),
    [("raise SystemExit(3)", "ended with status 3"), ("import time; time.sleep(60)", "not ready within")],
    ids=["ends", "hangs"],
)
async def test_a_start_that_fails_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    monkeypatch.setattr(daemon_module, "_PROGRAM", program)
    daemon = Daemon([])
    with pytest.raises(DaemonLostError, match=message):
        await daemon.start(0.5 if message.startswith("not") else 20)
    assert await daemon.ended() != 0
    assert not _folder(daemon).exists()
    with pytest.raises(RuntimeError, match="closed"):
        await daemon.client.send(httpx.Request("GET", "http://daemon/"))
