"""Responses that run while nobody waits."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response

from server.app import create_app
from server.background_responses import BackgroundResponses
from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.server.http_client import MODEL, api, serving
from tests.server.in_process_engine import scripted_text
from tests.server.responses_client import TEXT, responses_client


async def test_in_the_background(tokenizer: Tokenizer) -> None:
    engine, free = scripted_text(tokenizer, TEXT), asyncio.Event()
    working = engine.script
    engine.script = lambda request: [free, *working(request)]
    async with responses_client(engine, tokenizer) as client:
        begun = await client.responses.create(model=MODEL, input="Hi", background=True)
        assert (begun.status, begun.background, begun.output) == ("in_progress", True, [])
        assert (await client.responses.retrieve(begun.id)).status == "in_progress"
        with pytest.raises(openai.BadRequestError, match="not complete"):
            await client.responses.create(model=MODEL, input="B", previous_response_id=begun.id)
        free.set()
        done = await _until_done(client, begun.id)
        assert (done.status, done.output_text) == ("completed", TEXT)
        assert (await client.responses.cancel(begun.id)).status == "completed"
        more = await client.responses.create(model=MODEL, input="B", previous_response_id=begun.id)
    assert more.output_text == TEXT
    assert not engine.aborted


async def test_what_runs_in_the_background_can_be_ended(tokenizer: Tokenizer) -> None:
    engine, free = scripted_text(tokenizer, TEXT), asyncio.Event()
    engine.script = lambda request: [free]
    app = create_app(ServerConfig(), engine, tokenizer)
    async with (
        serving(app) as port,
        AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0) as client,
    ):
        first, second, third = [
            await client.responses.create(model=MODEL, input="Hi", background=True) for _ in range(3)
        ]
        assert (await client.responses.cancel(first.id)).status == "cancelled"
        await client.responses.delete(second.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(second.id)
        await app.state.service.background.close()
        assert (await client.responses.retrieve(third.id)).status == "failed"
        assert len(engine.aborted) == 3
        engine.script = lambda request: [RuntimeError("/secret/path")]
        broken = await client.responses.create(model=MODEL, input="Hi", background=True)
        failed = await _until_done(client, broken.id)
    assert failed.status == "failed"
    assert "secret" not in failed.model_dump_json()


async def test_the_background_has_room_for_some(tokenizer: Tokenizer, tmp_path: Path) -> None:
    engine, never = scripted_text(tokenizer, TEXT), asyncio.Event()
    engine.script = lambda request: [never]
    config = ServerConfig(responses_db=str(tmp_path / "responses.db"))
    app = create_app(config, engine, tokenizer)
    app.state.service.background = BackgroundResponses(max_running=1)
    body = {"input": "Hi", "background": True}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        first = await client.post("/v1/responses", json=body)
        second = await client.post("/v1/responses", json=body)
    assert (first.status_code, second.status_code) == (200, 429)
    assert second.json()["error"]["code"] == "rate_limit_exceeded"
    # As if the server had been killed: the next one finds a response that nobody works on.
    async with api(engine, tokenizer, config) as client:
        orphan = (await client.get(f"/v1/responses/{first.json()['id']}")).json()
    assert (orphan["status"], orphan["error"]["code"]) == ("failed", "server_error")
    await app.state.service.close()


async def _until_done(client: AsyncOpenAI, response_id: str) -> Response:
    async with asyncio.timeout(5):
        while (response := await client.responses.retrieve(response_id)).status == "in_progress":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return response
