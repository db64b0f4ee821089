"""One server in a network of its own, whose steps fail and whose machine runs out of things."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.server_process import ServerProcess
from tests.sizes import size

_AUDIT = Path(__file__).parent / "egress_audit"
# The first and the second sequence fail; then steps of all fail, run out of memory and hang.
_FAULTS = "sequence:15:nan,sequence:25:raise,step:35:raise,step:45:memory,step:55:sleep=0.3"
_LAST_FAULT = 55
_PROMPTS = ("Once upon a time", "The capital of France is", "def fibonacci(n):")


@dataclass
class _Hardened:
    process: ServerProcess
    uds: str
    egress_log: Path

    def client(self, **settings: Any) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(uds=self.uds)
        return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60, **settings)


@pytest.fixture(scope="module")
def hardened(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Hardened]:
    """A server without a network, with faults to come: for the first test."""
    folder = tmp_path_factory.mktemp("hardened")
    (folder / "egress").touch()
    environment = {
        "INFLIGHTD_FAULTS": _FAULTS,
        "EGRESS_LOG": str(folder / "egress"),
        "PYTHONPATH": os.pathsep.join([str(_AUDIT), os.environ.get("PYTHONPATH", "")]),
    }
    flags = ("--uds", str(folder / "s"), "--debug-faults", "--max-model-len", "512",
             "--responses-db", str(folder / "responses.db"))  # fmt: skip
    prefix = ("unshare", "-rn") if _has_namespaces() else ()
    with ServerProcess(*flags, environment=environment, prefix=prefix) as process:
        yield _Hardened(process, str(folder / "s"), folder / "egress")


@pytest.fixture
async def calm(hardened: _Hardened) -> _Hardened:
    """The same server, when its faults are over."""
    async with hardened.client() as client:
        while (await _series(client, "engine_steps_total"))[0] <= _LAST_FAULT:
            await client.post("/v1/completions", json=_completion("Hi"))
    return hardened


def _has_namespaces() -> bool:
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode == 0
    return False


def _completion(prompt: str, max_tokens: int = 60, **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **fields}


async def _stream(client: httpx.AsyncClient, body: dict[str, Any], begun: asyncio.Event) -> list[Any]:
    """The data of the events, the last of which may be an error."""
    data = []
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                data.append(line[6:])
                begun.set()
    return [text if text == "[DONE]" else json.loads(text) for text in data]


def _text(data: list[Any]) -> str:
    assert data[-1] == "[DONE]"
    return "".join(choice["text"] for event in data[:-1] for choice in event["choices"])


async def _series(client: httpx.AsyncClient, *names: str) -> list[float]:
    page = (await client.get("/metrics")).text.splitlines()
    return [
        sum(float(line.split()[-1]) for line in page if line.startswith(f"inflightd:{name}{{"))
        for name in names
    ]


async def test_faults_end_the_sequences_at_fault_only(hardened: _Hardened, server: ServerProcess) -> None:
    async with hardened.client() as client, httpx.AsyncClient(base_url=server.url, timeout=60) as quiet:
        streams = []
        for prompt in ("Victim one", "Victim two", *_PROMPTS):
            begun = asyncio.Event()
            streams.append(asyncio.create_task(_stream(client, _completion(prompt), begun)))
            if len(streams) <= 2:
                await begun.wait()
        ended = await asyncio.gather(*streams)
        for data in ended[:2]:
            assert data[-1]["error"]["type"] == "server_error"
            assert "told to fail" not in json.dumps(data[-1])
        alone = [(await quiet.post("/v1/completions", json=_completion(p))).json() for p in _PROMPTS]
        texts, expected = (
            [_text(data) for data in ended[2:]],
            [answer["choices"][0]["text"] for answer in alone],
        )
        assert texts == expected if server.is_exact else all(texts)
        assert (await client.get("/health/ready")).status_code == 200
        assert (
            await _series(client, "num_requests_running", "kv_cache_usage_perc", "engine_restarts_total")
            == [0] * 3
        )
    text = "\n".join(hardened.process.lines)
    assert "faults are injected" in text
    for told in (
        "step 35 was told to fail",
        "step 45 was told to have no memory",
        "a sequence was told to fail",
    ):
        assert told in text


async def test_without_file_descriptors_streams_go_on(calm: _Hardened) -> None:
    pid = calm.process.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    num_open = len(os.listdir(f"/proc/{pid}/fd"))
    async with calm.client() as client:
        begun = asyncio.Event()
        stream = asyncio.create_task(_stream(client, _completion("Once upon a time"), begun))
        await begun.wait()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (num_open + 8, before[1]))
        crowd = []
        try:
            for _ in range(40):
                crowd.append(socket.socket(socket.AF_UNIX))
                crowd[-1].setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    crowd[-1].connect(calm.uds)
            assert len(_text(await stream)) > 100
        finally:
            for one in crowd:
                one.close()
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    async with calm.client() as client:
        assert (await client.get("/health/live")).status_code == 200
        done = await client.post("/v1/completions", json=_completion("Hi", 3))
        assert done.json()["usage"]["completion_tokens"] == 3
    assert len(os.listdir(f"/proc/{pid}/fd")) <= num_open + 4


async def test_on_a_full_disk_answers_come_and_are_not_kept(calm: _Hardened) -> None:
    pid = calm.process.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    body = {"input": "Hi", "max_output_tokens": 4}
    async with calm.client() as client:
        kept = (await client.post("/v1/responses", json=body)).json()
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, before[1]))
        try:
            lost = await client.post("/v1/responses", json=body)
        finally:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        assert lost.status_code == 200
        assert lost.json()["output"]
        for name, status in ((kept["id"], 200), (lost.json()["id"], 404)):
            assert (await client.get(f"/v1/responses/{name}")).status_code == status
        later = (await client.post("/v1/responses", json=body)).json()
        assert (await client.get(f"/v1/responses/{later['id']}")).status_code == 200


async def test_an_engine_that_is_stopped_goes_on_with_the_same_tokens(calm: _Hardened) -> None:
    """In the suite it stands still for a moment only; 25 s with full sizes, which the watchdog just bears."""
    seconds = size(1, 25)
    engine = calm.process.engine_pid
    async with calm.client() as client:
        body = _completion("Once upon a time", 100)
        alone = (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
        begun = asyncio.Event()
        stream = asyncio.create_task(_stream(client, body, begun))
        await begun.wait()
        os.kill(engine, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
            assert (await client.get("/health/live")).status_code == 200
            if seconds > 6:
                assert (await client.get("/health/ready")).status_code == 503
            assert not stream.done()
        finally:
            os.kill(engine, signal.SIGCONT)
        assert _text(await stream) == alone
        assert (await client.get("/health/ready")).status_code == 200
    assert calm.process.engine_pid == engine


async def test_nothing_goes_to_the_network(calm: _Hardened) -> None:
    url = "http://169.254.169.254/latest"
    schema = {"name": "s", "strict": True, "schema": {"$ref": url + ".json"}}
    image = [{"type": "image_url", "image_url": {"url": url}}]
    chats: list[tuple[Any, dict[str, Any]]] = [
        (image, {}),
        ("Hi", {"response_format": {"type": "json_schema", "json_schema": schema}}),
        ("Hi", {"model": url}),
        (url, {"max_tokens": 4}),
    ]
    async with calm.client() as client:
        statuses = []
        for content, fields in chats:
            body = {"messages": [{"role": "user", "content": content}], **fields}
            statuses.append((await client.post("/v1/chat/completions", json=body)).status_code)
        assert statuses == [400, 400, 404, 200]
    assert calm.egress_log.read_text() == ""
    if not _has_namespaces():
        pytest.skip("no network namespaces here: what native code sends was not watched")
    counted = _counters(calm.process.read("net/snmp"))
    assert {name: number for name, number in counted.items() if number} == {}


def _counters(snmp: str) -> dict[str, int]:
    """What a network has sent, or could not send for want of a way (proc(5), /proc/net/snmp)."""
    lines = [line.split() for line in snmp.splitlines()]
    counted = {
        f"{names[0]}{name}": int(number)
        for names, numbers in zip(lines[::2], lines[1::2], strict=True)
        for name, number in zip(names[1:], numbers[1:], strict=True)
    }
    return {
        name: counted[name]
        for name in ("Ip:OutRequests", "Ip:OutNoRoutes", "Tcp:ActiveOpens", "Udp:OutDatagrams")
    }


def test_what_goes_to_the_network_would_be_seen(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = (
        "import contextlib, socket\nfor kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):\n"
        "    one = socket.socket(socket.AF_INET, kind)\n"
        "    with contextlib.suppress(OSError): one.connect(('192.0.2.1', 9))\n"
        "with contextlib.suppress(OSError): socket.getaddrinfo('example.invalid', 80)\n"
        "print(open('/proc/self/net/snmp').read(), end='')"
    )
    prefix = ("unshare", "-rn") if _has_namespaces() else ()
    environment = os.environ | {"PYTHONPATH": str(_AUDIT), "EGRESS_LOG": str(log)}
    command = [*prefix, sys.executable, "-c", script]
    shown = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    noted = log.read_text().splitlines()
    assert [line.split()[0] for line in noted] == ["socket.connect", "socket.connect", "socket.getaddrinfo"]
    if prefix:
        assert _counters(shown)["Ip:OutNoRoutes"] > 0
