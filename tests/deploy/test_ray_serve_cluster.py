"""A real Ray on this machine, two replicas with the default model. Figures: ``-s``.

Ray is no dependency of the project; where it is missing, these are skipped.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'ray[serve]'"
)
ROOT = Path(__file__).parents[2]
_FLAGS = ["--threads", "1", "--kv-cache-bytes", "128MiB", "--max-model-len", "2048"]


class Cluster:
    """``serve run`` with two replicas, unless ``options`` say otherwise.

    Attributes:
        lines: of its log.
    """

    def __init__(self, port: int, folder: Path, **options: Any) -> None:
        config = yaml.safe_load((ROOT / "deploy/ray_serve/serve.yaml").read_text())
        config["http_options"]["port"] = port
        args = {"min_replicas": 2, "max_replicas": 2, "num_cpus": 0.5, "endpoint_num_cpus": 0.1}
        config["applications"][0]["args"] = {**args, "arguments": _FLAGS, **options}
        (folder / "serve.yaml").write_text(yaml.safe_dump(config))
        self.url = f"http://127.0.0.1:{port}"
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("serve"), "run", folder / "serve.yaml"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(line.rstrip("\n") for line in self.process.stdout)

    def wait_until_ready(self, num_replicas: int = 2, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while len(daemons()) < num_replicas or not self._answers():
            has_failed = self.process.poll() is not None or any(
                "failed with exception" in x for x in self.lines
            )
            assert not has_failed, "\n".join(self.lines[-40:])
            assert time.monotonic() < deadline, "\n".join(self.lines[-40:])
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


def daemons() -> dict[int, Path]:
    """The process ids of daemons that are ready, and their sockets."""
    found = {}
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = line.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"--uds" in arguments and b"follow_parent" in b"".join(arguments):
            path = Path(os.fsdecode(arguments[arguments.index(b"--uds") + 1]))
            if path.exists() and _status(path) == 200:
                found[int(line.parent.name)] = path
    return found


def _status(path: Path) -> int:
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://daemon") as client:
            return client.get("/health/ready", timeout=5).status_code
    except httpx.TransportError:
        return 0


def metric(path: Path, name: str) -> float:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://daemon") as client:
        values = re.findall(
            rf"^inflightd:{name}(?:{{.*}})? (\S+)$", client.get("/metrics").text, re.MULTILINE
        )
    return sum(map(float, values))


@pytest.fixture(scope="module")
def cluster(smollm2_path: Path) -> Iterator[Cluster]:
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        cluster = Cluster(port, Path(folder))
        try:
            cluster.wait_until_ready()
            yield cluster
        finally:
            cluster.stop()


def _body(prompt: str, **fields: Any) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "max_tokens": 60,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        **fields,
    }


async def _events(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
    async with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for data in response.aiter_raw():
            yield data


async def _whole(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> bytes:
    return b"".join([data async for data in _events(client, path, body)])


def _text(stream: bytes) -> str:
    text = ""
    for event in stream.decode().removesuffix("\n\n").split("\n\n"):
        if event.startswith(":") or event == "data: [DONE]":
            continue
        for choice in json.loads(event.removeprefix("data: "))["choices"]:
            text += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return text


def _client(cluster: Cluster) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=cluster.url, timeout=120)


async def test_a_stream_is_the_daemons(cluster: Cluster) -> None:
    """But for how many tokens share a chunk, which is a matter of time."""
    path = next(iter(daemons().values()))
    body = _body("Once upon a time", request_id="same", stream_options={"include_usage": True})
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    async with (
        _client(cluster) as client,
        httpx.AsyncClient(transport=transport, base_url="http://daemon", timeout=120) as daemon,
    ):
        through = await _whole(client, "/v1/completions", body)
        direct = await _whole(daemon, "/v1/completions", body)
    assert _text(through) == _text(direct)

    def shape(stream: bytes) -> list[bytes]:
        """What the events are besides their texts."""
        varying = rb'"(created|cached_tokens)":\d+|(?<="text":)"(\\.|[^"\\])*"'
        events = re.sub(varying, b"", stream).split(b"\n\n")
        return [event for index, event in enumerate(events) if index == 0 or event != events[index - 1]]

    assert shape(through) == shape(direct)


async def test_a_prefix_stays_at_its_replica(cluster: Cluster) -> None:
    system = "You are the assistant of a small shop that sells tea. " * 24
    async with _client(cluster) as client:
        for question in ("Hello", "Do you have green tea?", "And black tea?", "Thanks"):
            messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
            answer = await client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2})
            cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached > 200 or question == "Hello"


async def test_a_client_that_goes_frees_the_engine(cluster: Cluster) -> None:
    paths = list(daemons().values())
    async with _client(cluster) as client:
        stream = _events(client, "/v1/completions", _body("Once", max_tokens=1500))
        await anext(stream)
        assert sum(metric(path, "num_requests_running") for path in paths) == 1
        await stream.aclose()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while sum(metric(path, "num_requests_running") for path in paths):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("victim", ["daemon", "replica"])
async def test_no_stream_is_lost_with_a_replica(cluster: Cluster, victim: str) -> None:
    """Greedy, seeded and unseeded streams, of texts and chats; one of two is killed in the middle."""
    cluster.wait_until_ready()
    cases: list[tuple[str, dict[str, Any]]] = []
    for index in range(4):
        cases.append(("/v1/completions", _body(f"{index} tales of", max_tokens=120)))
        messages = [{"role": "user", "content": f"Tell me {index} things."}]
        chat = {"messages": messages, "max_tokens": 120, "seed": index, "stream": True, "ignore_eos": True}
        cases.append(("/v1/chat/completions", chat))
    async with _client(cluster) as client:
        expected = [_text(await _whole(client, *case)) for case in cases]
        cases.append(("/v1/completions", _body("Whatever", temperature=1, max_tokens=120)))
        ready = daemons()
        running = [asyncio.create_task(_whole(client, *case)) for case in cases]
        await asyncio.sleep(0.8)
        busy = {pid: metric(path, "num_requests_running") for pid, path in ready.items()}
        chosen = max(busy, key=lambda pid: busy[pid])
        began = time.monotonic()
        os.kill(chosen if victim == "daemon" else _parent(chosen), signal.SIGKILL)
        streams = await asyncio.gather(*running)
    done = time.monotonic() - began
    print(f"\n{victim} killed with {busy[chosen]:.0f} of {len(cases)} streams; all done {done:.1f} s later")
    assert busy[chosen] >= 1
    assert [_text(stream) for stream in streams[:-1]] == expected
    assert all(stream.endswith(b"data: [DONE]\n\n") for stream in streams)
    assert all(len(set(re.findall(rb'"id":"([^"]*)"', stream))) == 1 for stream in streams)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.skipif("RAY_SERVE_FIGURES" not in os.environ, reason="figures only: set RAY_SERVE_FIGURES=1")
@pytest.mark.parametrize("num_streams", [1, 8])
async def test_figures(cluster: Cluster, num_streams: int) -> None:
    """Time to the first token and between tokens, through Serve and directly at the daemons, in turns."""
    cluster.wait_until_ready()
    first_s: dict[str, list[float]] = {"serve": [], "direct": []}
    gap_s: dict[str, list[float]] = {"serve": [], "direct": []}
    total_s: dict[str, float] = {"serve": 0.0, "direct": 0.0}

    async def one(client: httpx.AsyncClient, way: str, index: int) -> None:
        began = last = time.perf_counter()
        body = _body(f"Story number {index} of {num_streams}:", max_tokens=64)
        async for data in _events(client, "/v1/completions", body):
            now, count = time.perf_counter(), data.count(b'"text"')
            if last == began:
                first_s[way].append(now - began)
            elif count:
                gap_s[way] += [(now - last) / count] * count
            last = now

    paths = list(daemons().values())
    directs = [
        httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(path)), base_url="http://daemon", timeout=120
        )
        for path in paths
    ]
    async with _client(cluster) as client:
        for _ in range(9 if num_streams == 1 else 4):
            for way in ("serve", "direct"):
                began = time.perf_counter()
                clients = [client] if way == "serve" else directs
                await asyncio.gather(*(one(clients[i % len(clients)], way, i) for i in range(num_streams)))
                total_s[way] += time.perf_counter() - began
    for direct in directs:
        await direct.aclose()
    print()
    for way in first_s:
        ttft, gaps = statistics.median(first_s[way]) * 1e3, statistics.median(gap_s[way]) * 1e3
        print(
            f"{num_streams} streams, {way}: TTFT p50 {ttft:.1f} ms, p50 between tokens {gaps:.2f} ms, "
            f"{total_s[way]:.1f} s in all"
        )
