"""Requests that are sent again under the same ``Idempotency-Key``."""

from __future__ import annotations

import asyncio
import contextlib
import json

import httpx
import pytest

import server.kept_answers
from scheduler.messages import EngineOutput, FinishReason, Request
from server.api_keys import api_key
from server.app import create_app
from server.config import ServerConfig
from server.service import Service
from server.tokenizer import Tokenizer
from tests.server.http_client import api, chat, serving
from tests.server.in_process_engine import ScriptedEngine, tokens

PATH = "/v1/chat/completions"


async def _post(client: httpx.AsyncClient, key: str, path: str = PATH, **fields: object) -> httpx.Response:
    return await client.post(path, json=chat(**fields), headers={"idempotency-key": key})


def _code(response: httpx.Response) -> str:
    assert response.status_code == 409
    return str(response.json()["error"]["code"])


@pytest.mark.parametrize("stream", [False, True])
async def test_the_same_again_is_the_same_answer(tokenizer: Tokenizer, stream: bool) -> None:
    engine = ScriptedEngine(tokens([28], [29], [30]))
    async with api(engine, tokenizer) as client:
        first = await _post(client, "a", stream=stream)
        again = await _post(client, "a", stream=stream)
        other = await _post(client, "b", stream=stream)
        assert again.content == first.content
        assert (first.status_code, again.status_code) == (200, 200)
        assert again.headers["content-type"] == first.headers["content-type"]
        assert again.headers["idempotent-replayed"] == "true"
        assert again.headers["x-request-id"] != first.headers["x-request-id"]
        assert "idempotent-replayed" not in first.headers
        assert other.content != first.content  # another id
        assert len(engine.requests) == 2
        assert _code(await _post(client, "a", stream=stream, seed=1)) == "idempotency_key_reused"
        assert _code(await _post(client, "a", "/v1/responses", stream=stream)) == "idempotency_key_reused"
        assert len(engine.requests) == 2


async def test_a_stream_over_a_connection_is_kept_whole(tokenizer: Tokenizer) -> None:
    app = create_app(ServerConfig(), ScriptedEngine(tokens([28], [29], [30])), tokenizer)
    async with serving(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        first = await _post(client, "a", stream=True)
        again = await _post(client, "a", stream=True)
    assert again.headers["idempotent-replayed"] == "true"
    assert first.text.count("data: ") > 4
    assert again.text == first.text


async def test_the_same_at_the_same_time_is_generated_once(tokenizer: Tokenizer) -> None:
    gate = asyncio.Event()

    def script(request: Request) -> list[EngineOutput | asyncio.Event]:
        return [gate, EngineOutput(request.request_id, (28,), finish_reason=FinishReason.LENGTH)]

    engine = ScriptedEngine(script)  # type: ignore[arg-type]
    async with api(engine, tokenizer) as client:
        first = asyncio.create_task(_post(client, "a"))
        async with asyncio.timeout(5):
            while not engine.requests:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        second = await _post(client, "a")
        assert _code(second) == "idempotency_in_progress"
        assert second.headers["retry-after"] == "1"
        gate.set()
        assert (await _post(client, "a")).status_code in (200, 409)
        assert (await first).status_code == 200
        assert (await _post(client, "a")).content == (await first).content
        assert len(engine.requests) == 1


async def test_what_failed_is_tried_anew(tokenizer: Tokenizer) -> None:
    failing = [RuntimeError("x")]

    def script(request: Request) -> list[EngineOutput | Exception]:
        first = EngineOutput(request.request_id, (28,))
        last = EngineOutput(request.request_id, (28,), finish_reason=FinishReason.LENGTH)
        return [first, *failing, last]

    engine = ScriptedEngine(script)  # type: ignore[arg-type]
    async with api(engine, tokenizer) as client:
        assert (await _post(client, "whole")).status_code == 500
        assert json.loads((await _post(client, "stream", stream=True)).text.split("data: ")[-1])["error"]
        assert (await _post(client, "wrong", temperature=5)).status_code == 400
        failing.clear()
        for key, fields in (("whole", {}), ("stream", {"stream": True}), ("wrong", {})):
            done = await _post(client, key, **fields)
            assert done.status_code == 200
            assert "error" not in done.text
            assert "idempotent-replayed" not in done.headers


async def test_keys_of_others_are_others_keys(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokens([28]))
    config = ServerConfig(api_key=(api_key("k1", "ann"), api_key("k2", "bob")))
    async with api(engine, tokenizer, config) as client:
        answers = []
        for key in ("k1", "k2", "k1"):
            client.headers["authorization"] = f"Bearer {key}"
            answers.append(await _post(client, "a"))
        assert answers[0].content == answers[2].content != answers[1].content
        client.headers["authorization"] = "Bearer wrong"
        assert (await _post(client, "a")).status_code == 401


class _Peers:
    """Two API processes in one: each question goes to both."""

    exist = True

    def __init__(self) -> None:
        self.services: list[Service] = []

    async def ask(self, subject: str, argument: str = "") -> list[bytes]:
        assert subject == "idempotency"
        await asyncio.sleep(0.01)
        return [service.kept_answers.told(argument) for service in self.services]


async def test_several_processes_ask_each_other(tokenizer: Tokenizer) -> None:
    engine, peers = ScriptedEngine(tokens([28], [29])), _Peers()
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for _ in range(2):
            app = create_app(ServerConfig(), engine, tokenizer)
            app.state.service.peers = peers
            peers.services.append(app.state.service)
            port = await stack.enter_async_context(serving(app))
            url = f"http://127.0.0.1:{port}"
            clients.append(await stack.enter_async_context(httpx.AsyncClient(base_url=url)))
        for stream in (False, True):
            first = await _post(clients[0], f"a{stream}", stream=stream)
            again = await _post(clients[1], f"a{stream}", stream=stream)
            assert (again.content, again.headers["idempotent-replayed"]) == (first.content, "true")
            assert again.headers["content-type"] == first.headers["content-type"]
            assert _code(await _post(clients[1], f"a{stream}", seed=1)) == "idempotency_key_reused"
        assert len(engine.requests) == 2
        both = await asyncio.gather(*(_post(client, "b") for client in clients))
        assert [response.status_code for response in both].count(200) <= 1
        assert {_code(response) for response in both if response.status_code != 200} <= {
            "idempotency_in_progress"
        }
        assert (await _post(clients[1], "b")).status_code == 200
        assert len(engine.requests) == 3


async def test_what_is_kept_is_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.kept_answers, "_MAX_ANSWERS", 3)
    engine = ScriptedEngine(tokens([28]))
    async with api(engine, tokenizer) as client:
        answers = {key: (await _post(client, key)).content for key in "abcd"}
        for key in "bcd":
            assert (await _post(client, key)).content == answers[key]
        assert (await _post(client, "a")).content != answers["a"]
        monkeypatch.setattr(server.kept_answers, "_MAX_BYTES", 100)
        await _post(client, "e")
        assert "idempotent-replayed" not in (await _post(client, "d")).headers
        monkeypatch.setattr(server.kept_answers, "_MAX_ANSWER_BYTES", 100)
        assert (await _post(client, "f")).status_code == 200
        assert _code(await _post(client, "f")) == "idempotency_answer_lost"
        for wrong in ("", "a b", "x" * 256):
            assert (await _post(client, wrong)).status_code == 400
        await client.get("/v1/models", headers={"idempotency-key": "a b"})
