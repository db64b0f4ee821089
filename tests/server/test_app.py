from __future__ import annotations

import importlib.metadata
import re
import time

import openai
import pytest

from scheduler.messages import ExecutorSpec, FinishReason
from server.config import ServerConfig
from server.errors import EngineDeadError
from server.tokenizer import Tokenizer
from tests.server.http_client import MODEL, api, chat
from tests.server.in_process_engine import ScriptedEngine, tokens


class _LoadingEngine(ScriptedEngine):
    """An engine that has not been ready yet: even what it is, is not known."""

    def __init__(self) -> None:
        super().__init__(tokens([1]))
        self.is_ready = False

    @property
    def spec(self) -> ExecutorSpec:
        raise EngineDeadError("the model is still being loaded from /secret/path")

    @spec.setter
    def spec(self, value: ExecutorSpec) -> None:
        pass


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/health/live"])
async def test_health_of_a_ready_server(tokenizer: Tokenizer, path: str) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        assert (await client.get(path)).status_code == 200
        assert (await client.head(path)).status_code == 200


async def test_a_server_that_is_loading(tokenizer: Tokenizer) -> None:
    async with api(_LoadingEngine(), tokenizer) as client:
        assert (await client.get("/health/live")).status_code == 200
        for path in ("/health", "/health/ready"):
            response = await client.get(path)
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
        models = (await client.get("/v1/models")).json()
        assert models["data"][0]["max_model_len"] is None
        assert (await client.get("/metrics")).status_code == 200
        for path, body in (("/v1/chat/completions", chat()), ("/v1/completions", {"prompt": "x"})):
            response = await client.post(path, json=body)
            assert response.status_code == 503
            assert response.json()["error"]["type"] == "server_error"
            assert "secret" not in response.text


async def test_models(tokenizer: Tokenizer) -> None:
    config = ServerConfig(served_model_name=("org/main", "alias"))
    engine = ScriptedEngine(tokens([1]))
    async with (
        api(engine, tokenizer, config) as http,
        openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http) as client,
    ):
        models = [model async for model in client.models.list()]
        assert [model.id for model in models] == ["org/main", "alias"]
        model = await client.models.retrieve("org/main")
        assert (model.object, model.owned_by) == ("model", "inflightd")
        assert model.model_dump()["max_model_len"] == engine.spec.max_model_len
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("../../etc/passwd")
        assert caught.value.code == "model_not_found"
        # Answers carry the name that was asked for; without one, the first.
        for asked, told in (("alias", "alias"), ("org/main", "org/main"), (None, "org/main")):
            answer = await http.post("/v1/chat/completions", json=chat() | {"model": asked})
            assert answer.json()["model"] == told


async def test_version(tokenizer: Tokenizer) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        assert (await client.get("/version")).json() == {"version": importlib.metadata.version("inflightd")}


async def test_errors_reach_the_openai_client(tokenizer: Tokenizer) -> None:
    async with (
        api(ScriptedEngine(tokens([1])), tokenizer) as http,
        openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http, max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "x"}], temperature=3
            )
        assert caught.value.param == "temperature"
        assert caught.value.request_id


async def test_what_an_engine_that_restarts_cannot_take_is_no_request_of_the_metrics(
    tokenizer: Tokenizer,
) -> None:
    engine = ScriptedEngine(tokens([1]))
    engine.is_ready = False
    async with api(engine, tokenizer) as client:
        assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 503
        page = (await client.get("/metrics")).text
    assert re.findall(
        r"(?m)^inflightd:(?:request_success_total|e2e_request_latency_seconds_count).* (\S+)", page
    ) == (["0.0"] * 5)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_dies_before_the_first_token_is_a_503(
    tokenizer: Tokenizer, stream: bool
) -> None:
    engine = ScriptedEngine(lambda request: [EngineDeadError("ended by SIGKILL: /secret/path")])
    async with api(engine, tokenizer) as client:
        response = await client.post("/v1/chat/completions", json=chat(stream=stream))
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "engine_unavailable"
    assert "secret" not in response.text


async def test_a_stream_that_breaks_raises_in_the_openai_client(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokens([28], [], finish=FinishReason.ERROR))
    async with (
        api(engine, tokenizer) as http,
        openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http, max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], stream=True
        )
        role, content = await anext(stream), await anext(stream)
        assert (role.choices[0].delta.role, content.choices[0].delta.content) == ("assistant", ",")
        with pytest.raises(openai.APIError):
            await anext(stream)


async def test_a_million_biases_are_refused_at_once(tokenizer: Tokenizer) -> None:
    body = chat(logit_bias={f"x{index}": "bad" for index in range(300_000)})
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        began = time.process_time()
        response = await client.post("/v1/chat/completions", json=body)
        assert time.process_time() - began < 2.0  # most of it is this client writing JSON
    assert response.json()["error"]["param"] == "logit_bias"
