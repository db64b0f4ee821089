from __future__ import annotations

import asyncio
import socket
import ssl
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from scheduler.messages import EngineOutput, Request
from server import listening
from server.app import create_app
from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.server.http_client import serving, serving_at
from tests.server.in_process_engine import ScriptedEngine


async def test_a_connection_whose_client_stops_reading_is_dropped(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(request: Request) -> Iterator[EngineOutput]:
        while True:
            yield EngineOutput(request.request_id, (28,) * 8192)

    monkeypatch.setattr(listening, "_UNSENT_TIMEOUT_MS", 500)
    engine = ScriptedEngine(endless)
    app = create_app(ServerConfig(), engine, tokenizer)
    body = b'{"prompt":"x","stream":true}'
    with listening.listen(ServerConfig(port=0)) as listener:
        async with serving_at(listener, app) as server:
            with socket.create_connection(listener.getsockname()) as client:
                client.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
                )
                async with asyncio.timeout(15):
                    while not engine.aborted or server.server_state.connections:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)


async def test_https_and_nothing_else(tokenizer: Tokenizer, certificate: tuple[str, str]) -> None:
    certfile, keyfile = certificate
    listening.check_certificate(ServerConfig(ssl_certfile=certfile, ssl_keyfile=keyfile))
    app = create_app(ServerConfig(), ScriptedEngine(lambda request: []), tokenizer)
    async with serving(app, ssl_certfile=certfile, ssl_keyfile=keyfile) as port:
        context = ssl.create_default_context(cafile=certfile)
        async with httpx.AsyncClient(verify=context) as client:
            assert (await client.get(f"https://localhost:{port}/version")).status_code == 200
            with pytest.raises(httpx.TransportError):
                await client.get(f"http://localhost:{port}/version")
        # A head that is refused is answered here too.
        reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert b" 400 " in await reader.readline()
        writer.close()


def test_certificates_that_cannot_be_used(tmp_path: Path, certificate: tuple[str, str]) -> None:
    certfile, keyfile = certificate
    other = tmp_path / "other.pem"
    other.write_text("no certificate")
    locked = tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "pkey", "-in", keyfile, "-aes256", "-passout", "pass:x", "-out", str(locked)], check=True
    )
    for config, says in (
        (ServerConfig(ssl_certfile=str(tmp_path / "none.pem")), "none.pem: No such file"),
        (ServerConfig(ssl_certfile=str(other), ssl_keyfile=keyfile), "other.pem and .*key.pem"),
        (ServerConfig(ssl_certfile=certfile, ssl_keyfile=str(locked)), "passphrase"),
    ):
        with pytest.raises(listening.LaunchError, match=says):
            listening.check_certificate(config)


def test_a_unix_socket_is_for_this_user_and_group(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with listening.listen(ServerConfig(uds=str(path))):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with pytest.raises(listening.LaunchError, match="in use"):
            listening.listen(ServerConfig(uds=str(path)))
    # Nobody listens any more: the next server takes it. A file that is no socket is never touched.
    listening.listen(ServerConfig(uds=str(path))).close()
    other = tmp_path / "file"
    other.write_text("precious")
    with pytest.raises(listening.LaunchError, match="--uds"):
        listening.listen(ServerConfig(uds=str(other)))
    assert other.read_text() == "precious"


def test_the_operators_socket_is_for_this_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    config = ServerConfig(admin_uds=str(path), admin_port=0)
    listener = listening.listen_for_admin(config)
    assert listener is not None
    with listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(listening.LaunchError, match="--admin-uds"):
            listening.listen_for_admin(config)
    assert listening.listen_for_admin(ServerConfig()) is None
    listener = listening.listen_for_admin(ServerConfig(admin_port=0))
    assert listener is not None
    with listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(listening.LaunchError, match="--admin-port"):
            listening.listen_for_admin(ServerConfig(admin_port=port))
