from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from server import cli, terminal_chat
from server.terminal_chat import run_chat


class Api(BaseHTTPRequestHandler):
    """Speaks just enough of the API to see what the client sends."""

    seen: list[dict[str, Any]]
    stream: str
    key: str | None

    def do_GET(self) -> None:
        if self.key is not None and self.headers["Authorization"] != f"Bearer {self.key}":
            self._send(401, "application/json", "{}")
            return
        self._send(200, "application/json", json.dumps({"data": [{"id": "tiny"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        if body["messages"][-1]["content"] == "bad":
            self._send(400, "application/json", json.dumps({"error": {"message": "not that"}}))
        else:
            self._send(200, "text/event-stream", self.stream)

    def _send(self, status: int, kind: str, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        pass


def events(*bodies: dict[str, Any], done: bool = True) -> str:
    lines = [f"data: {json.dumps(body)}\n\n" for body in bodies]
    return ": ping\n\n" + "".join(lines) + ("data: [DONE]\n\n" if done else "")


def content(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}]}


@pytest.fixture
def api() -> Iterator[str]:
    Api.seen = []
    Api.key = None
    Api.stream = events(content("Hel"), content("lo"), {"choices": [{"delta": {}}]}, {"choices": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def chat(url: str, text: str, **settings: Any) -> tuple[int, str]:
    sink = io.StringIO()
    values: dict[str, Any] = {"model": None, "system": None, "temperature": None, "max_tokens": None}
    status = run_chat(url, *(values | settings).values(), source=io.StringIO(text), sink=sink)
    return status, sink.getvalue()


def test_a_conversation_keeps_its_history(api: str) -> None:
    assert chat(api, "Hi\nAgain\n", system="Be brief.", temperature=0.5) == (0, "Hello\nHello\n")
    assert Api.seen[1] == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Again"},
        ],
        "stream": True,
        "temperature": 0.5,
        "model": "tiny",
    }


def test_reset_and_exit(api: str) -> None:
    chat(api, "Hi\n/reset\nAgain\n/exit\nnever\n")
    assert [len(body["messages"]) for body in Api.seen] == [1, 1]


def test_the_key_is_sent(
    api: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Api.key = "good"
    monkeypatch.setattr(terminal_chat, "run_chat", partial(run_chat, source=io.StringIO("Hi\n")))
    assert cli.main(["chat", "--url", api]) == 1
    assert "--api-key" in capsys.readouterr().err
    monkeypatch.setenv("INFLIGHTD_API_KEY", "good,other")
    assert cli.main(["chat", "--url", api, "--api-key", "bad"]) == 1
    assert cli.main(["chat", "--url", api]) == 0


def test_a_refusal_is_shown(api: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(api, "bad\n")[0] == 1
    assert capsys.readouterr().err == "\ninflightd chat: not that\n"


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (events(content("He"), done=False), "the answer broke off"),
        (events(content("He"), {"error": {"message": "engine died"}}, done=False), "engine died"),
    ],
)
def test_a_broken_stream_is_shown(
    api: str, stream: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Api.stream = stream
    assert chat(api, "Hi\n")[0] == 1
    assert says in capsys.readouterr().err


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert chat("http://127.0.0.1:9", "Hi\n")[0] == 1
    assert "Start one with 'inflightd serve'" in capsys.readouterr().err
