"""Several API processes on one engine and one port, in the order of what they live through."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.server_process import ServerProcess

BODY = {"model": "smollm2-135m-instruct", "prompt": "Once upon a time", "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def admin_uds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("admin") / "socket"


@pytest.fixture(scope="module")
def server(smollm2_path: Path, admin_uds: Path) -> Iterator[ServerProcess]:
    flags = ("--api-workers", "2", "--max-model-len", "512", "--admin-uds", str(admin_uds))
    with ServerProcess(*flags) as server:
        yield server
    assert server.process.returncode == 0
    assert any("shutting down" in line for line in server.lines)


def worker_pids(server: ServerProcess) -> list[int]:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [
        pid for pid in map(int, children) if b"server.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def ports_of(pid: int) -> set[int]:
    """The other ends of a process's TCP connections."""
    inodes = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            link = os.readlink(path)
            if link.startswith("socket:["):
                inodes.add(link[8:-1])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(row[2].split(":")[1], 16) for row in rows if row[9] in inodes}


class Stream(threading.Thread):
    """One streamed completion on a connection of its own."""

    def __init__(self, url: str, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._max_tokens = max_tokens
        self.port = 0
        self.text = ""
        self.is_whole = False
        self.error: str | None = None
        self.begun = threading.Event()

    def run(self) -> None:
        body = BODY | {"max_tokens": self._max_tokens, "stream": True}
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=60) as response:
                stream = response.extensions["network_stream"]
                self.port = stream.get_extra_info("client_addr")[1]
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        self.is_whole = True
                    elif line.startswith("data: "):
                        event = json.loads(line[6:])
                        if "error" in event:
                            self.error = event["error"]["code"]
                            continue
                        self.text += event["choices"][0]["text"]
                        self.begun.set()
        except httpx.HTTPError:
            self.begun.set()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def started(server: ServerProcess, max_tokens: int) -> dict[int, list[Stream]]:
    """Streams that have begun, by worker, at least one at each; 0: those that ended before it was known."""
    workers = worker_pids(server)
    streams: dict[int, list[Stream]] = {pid: [] for pid in (*workers, 0)}
    deadline = time.monotonic() + 20
    while not all(streams[pid] for pid in workers):
        assert time.monotonic() < deadline
        batch = [Stream(server.url, max_tokens) for _ in range(3)]
        for stream in batch:
            stream.start()
        for stream in batch:
            assert stream.begun.wait(20)
        ports = {pid: ports_of(pid) for pid in workers}
        for stream in batch:
            streams[next((pid for pid in workers if stream.port in ports[pid]), 0)].append(stream)
    return streams


@pytest.fixture(scope="module")
def text(server: ServerProcess) -> str:
    """What every stream of 24 tokens says."""
    answer = httpx.post(f"{server.url}/v1/completions", json=BODY | {"max_tokens": 24}, timeout=60).json()
    assert answer["usage"]["completion_tokens"] == 24
    said: str = answer["choices"][0]["text"]
    return said


def test_all_of_them_serve_and_count_together(server: ServerProcess, text: str) -> None:
    counted = [server.metric("request_success_total"), server.metric("generation_tokens_total")]
    assert counted == [1, 24]
    streams = [stream for each in started(server, 24).values() for stream in each]
    for stream in streams:
        stream.join(60)
    assert {stream.text for stream in streams} == {text}
    assert all(stream.is_whole for stream in streams)
    for _ in range(6):  # whoever answers
        assert server.metric("request_success_total") == 1 + len(streams)
        assert server.metric("generation_tokens_total") == 24 * (1 + len(streams))
        assert server.metric("num_requests_running") == 0


def test_a_response_in_the_background_is_found_from_everywhere(server: ServerProcess) -> None:
    body = {"model": BODY["model"], "input": "Hello", "background": True, "max_output_tokens": 450}
    created = httpx.post(f"{server.url}/v1/responses", json=body, timeout=20).json()
    url = f"{server.url}/v1/responses/{created['id']}"
    ended = "completed", "incomplete"  # a fast GPU may be there already
    for _ in range(8):
        assert httpx.get(url).json()["status"] in ("in_progress", *ended)
    assert httpx.post(f"{url}/cancel").json()["status"] in ("cancelled", *ended)
    server.wait_until("num_requests_running", 0)


def test_a_request_that_is_sent_again_is_answered_once_by_all_of_them(server: ServerProcess) -> None:
    before = server.metric("request_success_total")
    answers = [
        httpx.post(
            f"{server.url}/v1/completions",
            json=BODY | {"max_tokens": 4},
            headers={"idempotency-key": "the-same"},
            timeout=20,
        )
        for _ in range(8)  # each on a connection of its own, so at any of them
    ]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert [answer.headers.get("idempotent-replayed") for answer in answers] == [None] + ["true"] * 7
    assert server.metric("request_success_total") == before + 1


def test_streams_of_all_go_on_when_the_engine_dies(server: ServerProcess, text: str) -> None:
    streams = [stream for each in started(server, 24).values() for stream in each]
    os.kill(server.engine_pid, signal.SIGKILL)
    for stream in streams:
        stream.join(60)
    assert {stream.text for stream in streams} == {text}
    assert server.metric("engine_restarts_total") == 1


def test_one_that_is_killed_takes_only_its_own_connections_along(server: ServerProcess, text: str) -> None:
    before = server.metric("request_success_total")
    killed, other = worker_pids(server)
    streams = started(server, 150)
    os.kill(killed, signal.SIGKILL)
    for stream in (*streams[killed], *streams[other]):
        stream.join(60)
    assert all(stream.is_whole and stream.text.startswith(text) for stream in streams[other])
    assert not any(stream.is_whole for stream in streams[killed])
    server.wait_until("num_requests_running", 0)
    assert server.metric("request_success_total") >= before
    wait_for(lambda: len(worker_pids(server)) == 2)
    assert killed not in worker_pids(server)
    assert httpx.get(f"{server.url}/health/ready").status_code == 200
    assert any(re.search(r"API process \d ended", line) for line in server.lines)


def test_an_operator_reaches_all_of_them(server: ServerProcess, admin_uds: Path, text: str) -> None:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(admin_uds)), base_url="http://admin") as admin:
        wait_for(lambda: admin.get("/admin/status").json()["api_workers"] == 2)  # one was just started again
        streams = [stream for each in started(server, 400).values() for stream in each]
        listed = admin.get("/admin/requests").json()["data"]
        assert len(listed) == len(streams)
        assert admin.post("/admin/prefix_cache/flush", json={}).json()["flushed_blocks"] > 0
        assert admin.post("/admin/profile", json={"num_steps": 3}).json()["traceEvents"]
        for call in listed:
            aborted = admin.post(f"/admin/requests/{call['x_request_id']}/abort", json={}).json()
            assert aborted == {"aborted": [call["id"]]}
        for stream in streams:
            stream.join(20)
        assert {stream.error for stream in streams} == {"request_aborted"}
        assert not any(stream.is_whole for stream in streams)
        server.wait_until("num_requests_running", 0)
        assert admin.post("/admin/drain", json={}).json()["is_ready"] is False
        os.kill(worker_pids(server)[0], signal.SIGKILL)
        time.sleep(0.2)
        wait_for(lambda: admin.get("/admin/status").json()["api_workers"] == 2)
        for _ in range(8):  # whoever answers, and one of them has only just begun
            assert httpx.get(f"{server.url}/health/ready").status_code == 503
            refused = httpx.post(f"{server.url}/v1/completions", json=BODY | {"max_tokens": 24})
            assert refused.json()["error"]["code"] == "draining"
        status = admin.post("/admin/undrain", json={}).json()
        assert status["takes_requests"] is True
        # The new one may not have joined the engine.
        wait_for(lambda: admin.get("/admin/status").json()["is_ready"])
    answer = httpx.post(f"{server.url}/v1/completions", json=BODY | {"max_tokens": 24}, timeout=60).json()
    assert answer["choices"][0]["text"] == text
