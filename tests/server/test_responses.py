"""OpenAI's ``/v1/responses``, with its own client and without."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response

from scheduler.messages import EngineOutput, FinishReason, Request, TokenLogprobs
from server.api_keys import api_key
from server.app import create_app
from server.background_responses import BackgroundResponses
from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.server.http_client import MODEL, api, named_events, serving
from tests.server.in_process_engine import ScriptedEngine, scripted_text

TEXT = "Paris is 🙂 the capital."


def _scripted(tokenizer: Tokenizer, text: str = TEXT, *, with_eos: bool = True) -> ScriptedEngine:
    return scripted_text(tokenizer, text, with_eos=with_eos)


@asynccontextmanager
async def _client(
    engine: ScriptedEngine, tokenizer: Tokenizer, config: ServerConfig | None = None, key: str = "none"
) -> AsyncIterator[AsyncOpenAI]:
    async with (
        serving(create_app(config or ServerConfig(), engine, tokenizer)) as port,
        AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0) as client,
    ):
        yield client


async def test_the_client_whole(tokenizer: Tokenizer) -> None:
    engine = _scripted(tokenizer)
    async with _client(engine, tokenizer) as client:
        response = await client.responses.create(
            model=MODEL, input="Hi", instructions="Be brief.", metadata={"a": "b"}, max_output_tokens=50
        )
        again = await client.responses.retrieve(response.id)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert list(engine.requests[0].prompt_token_ids) == tokenizer.encode_chat(chat)
    assert engine.requests[0].params.max_tokens == 50
    assert response.output_text == TEXT
    assert (response.status, response.object, response.model) == ("completed", "response", MODEL)
    assert [item.type for item in response.output] == ["message"]
    assert (response.instructions, response.metadata) == ("Be brief.", {"a": "b"})
    assert (response.error, response.incomplete_details) == (None, None)
    assert (response.temperature, response.top_p, response.tool_choice) == (1.0, 1.0, "auto")
    assert response.usage is not None
    assert response.usage.input_tokens == len(tokenizer.encode_chat(chat))
    assert response.usage.input_tokens_details.cached_tokens == 16
    assert response.usage.output_tokens == len(tokenizer.encode(TEXT)) + 1
    assert again.model_dump() == response.model_dump()


async def test_the_client_streaming(tokenizer: Tokenizer) -> None:
    async with _client(_scripted(tokenizer), tokenizer) as client:
        async with client.responses.stream(model=MODEL, input="Hi") as stream:
            pieces = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            response = await stream.get_final_response()
        stored = await client.responses.retrieve(response.id)
        whole = await client.responses.create(model=MODEL, input="Hi")
    assert "".join(pieces) == response.output_text == TEXT
    assert len(pieces) > 3
    assert stored.output == whole.model_copy(update={"output": stored.output}).output
    different = {"id", "created_at", "completed_at", "output"}
    assert stored.model_dump(exclude=different) == whole.model_dump(exclude=different)
    assert [item.model_dump(exclude={"id"}) for item in stored.output] == [
        item.model_dump(exclude={"id"}) for item in whole.output
    ]


async def test_the_order_of_events(tokenizer: Tokenizer) -> None:
    async with api(_scripted(tokenizer), tokenizer) as client:
        response = await client.post("/v1/responses", json={"input": "Hi", "stream": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        events = named_events(response.text)
        stored = (await client.get(f"/v1/responses/{events[0][1]['response']['id']}")).json()
    names = [name for name, _ in events]
    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(names[4:-4]) == {"response.output_text.delta"}
    assert names[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert all(data["type"] == name for name, data in events)
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    assert events[0][1]["response"]["status"] == "in_progress"
    [item] = events[-1][1]["response"]["output"]
    assert events[-2][1]["item"] == item
    assert events[-4][1]["text"] == item["content"][0]["text"] == TEXT
    assert {data["item_id"] for _, data in events if "item_id" in data} == {item["id"]}
    assert stored == events[-1][1]["response"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_cut_off(tokenizer: Tokenizer, stream: bool) -> None:
    async with api(_scripted(tokenizer, with_eos=False), tokenizer) as client:
        answer = await client.post("/v1/responses", json={"input": "Hi", "stream": stream})
    if stream:
        name, data = named_events(answer.text)[-1]
        assert name == "response.incomplete"
    response = data["response"] if stream else answer.json()
    assert (response["status"], response["completed_at"]) == ("incomplete", None)
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"


async def test_an_answer_without_text(tokenizer: Tokenizer) -> None:
    async with api(_scripted(tokenizer, ""), tokenizer) as client:
        whole = (await client.post("/v1/responses", json={"input": "Hi"})).json()
        streamed = await client.post("/v1/responses", json={"input": "Hi", "stream": True})
    assert whole["output"][0]["content"][0]["text"] == ""
    assert "response.output_item.done" in [name for name, _ in named_events(streamed.text)]


async def test_a_conversation(tokenizer: Tokenizer) -> None:
    engine = _scripted(tokenizer)
    async with _client(engine, tokenizer) as client:
        first = await client.responses.create(model=MODEL, input="A", instructions="Only now.")
        second = await client.responses.create(
            model=MODEL, input=[{"role": "user", "content": "B"}], previous_response_id=first.id
        )
        third = await client.responses.create(
            model=MODEL, input="C", previous_response_id=second.id, store=False
        )
        counted = await client.responses.input_tokens.count(
            model=MODEL, input="C", previous_response_id=second.id
        )
        items = await client.responses.input_items.list(second.id, order="asc")
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(third.id)
        await client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError) as deleted:
            await client.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError) as missing:
            await client.responses.create(model=MODEL, input="D", previous_response_id=first.id)
        # What the second answers does not go with the first.
        again = await client.responses.create(model=MODEL, input="C", previous_response_id=second.id)
    texts = ["A", TEXT, "B", TEXT, "C"]
    chat = [{"role": "assistant" if t == TEXT else "user", "content": t} for t in texts]
    assert list(engine.requests[2].prompt_token_ids) == tokenizer.encode_chat(chat)
    assert engine.requests[-1].prompt_token_ids == engine.requests[2].prompt_token_ids
    assert again.previous_response_id == second.id
    assert counted.input_tokens == len(tokenizer.encode_chat(chat))
    assert [(item.role, item.content[0].text) for item in items.data] == [  # type: ignore[union-attr]
        ("user", "A"),
        ("assistant", TEXT),
        ("user", "B"),
    ]
    assert deleted.value.code == "response_not_found"
    assert (missing.value.code, missing.value.param) == (
        "previous_response_not_found",
        "previous_response_id",
    )


async def test_pages_of_items(tokenizer: Tokenizer) -> None:
    async with api(_scripted(tokenizer), tokenizer) as client:
        items = [{"role": "user", "content": text, "id": f"msg_{text}"} for text in "ABCDE"]
        created = (await client.post("/v1/responses", json={"input": items})).json()
        path = f"/v1/responses/{created['id']}/input_items"

        async def page(query: str) -> tuple[str, bool]:
            shown = (await client.get(f"{path}?{query}")).json()
            ids = [item["id"] for item in shown["data"]]
            assert (shown["first_id"], shown["last_id"]) == (ids[0], ids[-1])
            return "".join(item["content"][0]["text"] for item in shown["data"]), shown["has_more"]

        assert await page("") == ("EDCBA", False)
        assert await page("limit=2") == ("ED", True)
        assert await page("limit=2&after=msg_D") == ("CB", True)
        assert await page("limit=3&after=msg_B&order=asc") == ("CDE", False)
        for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=msg_X"):
            response = await client.get(f"{path}?{query}")
            assert response.status_code == 400
            assert response.json()["error"]["param"] == query.partition("=")[0]
        cancelled = await client.post(f"/v1/responses/{created['id']}/cancel")
        assert cancelled.status_code == 400
        assert (await client.get(f"/v1/responses/{created['id']}?stream=true")).status_code == 400
        for method, path in (
            ("GET", "/v1/responses/x"),
            ("GET", "/v1/responses/x/input_items"),
            ("POST", "/v1/responses/x/cancel"),
            ("DELETE", "/v1/responses/x"),
        ):
            assert (await client.request(method, path)).status_code == 404


async def test_logprobs(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Paris.")

    def script(request: Request) -> list[EngineOutput]:
        return [
            EngineOutput(
                request.request_id,
                (token_id,),
                logprobs=(TokenLogprobs(token_id, -0.5, 1, ((token_id, -0.5), (1, -2.0))),),
                finish_reason=FinishReason.LENGTH if position == len(ids) - 1 else None,
            )
            for position, token_id in enumerate(ids)
        ]

    body = {"input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    async with api(ScriptedEngine(script), tokenizer) as client:
        whole = (await client.post("/v1/responses", json=body)).json()
        streamed = named_events((await client.post("/v1/responses", json=body | {"stream": True})).text)
        plain = (await client.post("/v1/responses", json={"input": "Hi"})).json()
    logprobs = whole["output"][0]["content"][0]["logprobs"]
    assert "".join(record["token"] for record in logprobs) == "Paris."
    assert [len(record["top_logprobs"]) for record in logprobs] == [2] * len(ids)
    deltas = [data["logprobs"] for name, data in streamed if name == "response.output_text.delta"]
    assert [record for records in deltas for record in records] == logprobs
    assert streamed[-1][1]["response"]["output"][0]["content"][0]["logprobs"] == logprobs
    assert plain["output"][0]["content"][0]["logprobs"] == []


WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": None,
}
ARGUMENTS = '{"city": "São Paulo"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'


async def test_reasoning_text_and_calls(thinking: Tokenizer) -> None:
    engine = _scripted(thinking, f"<think>Hm.</think>I look.\n{CALL}\n{CALL}")
    async with _client(engine, thinking) as client:
        whole = await client.responses.create(model=MODEL, input="Hi", tools=[WEATHER])
        async with client.responses.stream(model=MODEL, input="Hi", tools=[WEATHER]) as stream:
            told = [event async for event in stream]
            streamed = await stream.get_final_response()
        follow = await client.responses.create(
            model=MODEL,
            previous_response_id=streamed.id,
            input=[{"type": "function_call_output", "call_id": streamed.output[2].call_id, "output": "Sun"}],
            tools=[WEATHER],
        )
    for response in (whole, streamed):
        assert [item.type for item in response.output] == [
            "reasoning",
            "message",
            "function_call",
            "function_call",
        ]
        reasoning, message, first, second = response.output
        assert reasoning.content[0].text == "Hm."
        assert message.content[0].text == response.output_text == "I look."
        assert (first.name, first.arguments, first.status) == ("get_weather", ARGUMENTS, "completed")
        assert first.call_id != second.call_id
        assert response.usage is not None
        assert response.usage.output_tokens_details.reasoning_tokens > 0
        assert response.tools[0].name == "get_weather"
    arguments = [e.delta for e in told if e.type == "response.function_call_arguments.delta"]
    assert "".join(arguments) == ARGUMENTS * 2
    assert [e.arguments for e in told if e.type == "response.function_call_arguments.done"] == [ARGUMENTS] * 2
    assert "".join(e.delta for e in told if e.type == "response.reasoning_text.delta") == "Hm."
    assert follow.status == "completed"
    prompt = thinking.decode(engine.requests[-1].prompt_token_ids)
    assert prompt.count("São Paulo") == 2
    assert "Sun" in prompt


async def test_choices_of_tools(thinking: Tokenizer) -> None:
    engine = _scripted(thinking, CALL * 2)
    other = WEATHER | {"name": "get_time"}

    async def post(**fields: Any) -> Any:
        async with api(engine, thinking) as client:
            body = {"input": "Hi", "tools": [WEATHER, other], **fields}
            return (await client.post("/v1/responses", json=body)).json()

    def calls(response: Any) -> int:
        return sum(item["type"] == "function_call" for item in response["output"])

    assert calls(await post()) == 2
    assert calls(await post(parallel_tool_calls=False)) == 1
    assert calls(await post(tool_choice="none")) == 0
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_time"}]}
    answer = await post(tool_choice=allowed)
    assert answer["tool_choice"] == allowed
    assert "get_weather" not in thinking.decode(engine.requests[-1].prompt_token_ids)
    allowed["tools"] = [{"type": "function", "name": "get_money"}]
    assert (await post(tool_choice=allowed))["error"]["param"] == "tool_choice"
    named = {"type": "function", "name": "get_money"}
    assert (await post(tool_choice=named))["error"]["param"] == "tool_choice"


async def test_a_stream_that_fails(tokenizer: Tokenizer) -> None:
    engine = _scripted(tokenizer)
    working = engine.script

    def breaks(request: Request) -> list[EngineOutput | Exception]:
        return [*list(working(request))[:2], RuntimeError("/secret/path")]  # type: ignore[list-item]

    engine.script = breaks
    async with api(engine, tokenizer) as client:
        streamed = await client.post("/v1/responses", json={"input": "Hi", "stream": True})
        name, data = named_events(streamed.text)[-1]
        stored = (await client.get(f"/v1/responses/{data['response']['id']}")).json()
        whole = await client.post("/v1/responses", json={"input": "Hi"})
        engine.is_ready = False
        late = await client.post("/v1/responses", json={"input": "Hi", "stream": True})
    assert name == "response.failed"
    assert stored == data["response"]
    assert stored["status"] == "failed"
    assert stored["error"]["code"] == "server_error"
    assert "secret" not in streamed.text
    assert stored["output"][0]["status"] == "incomplete"
    assert (whole.status_code, late.status_code) == (500, 503)


async def test_in_the_background(tokenizer: Tokenizer) -> None:
    engine, free = _scripted(tokenizer), asyncio.Event()
    working = engine.script
    engine.script = lambda request: [free, *working(request)]
    async with _client(engine, tokenizer) as client:
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
    engine, free = _scripted(tokenizer), asyncio.Event()
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
    engine, never = _scripted(tokenizer), asyncio.Event()
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


async def test_a_response_belongs_to_its_key(tokenizer: Tokenizer, tmp_path: Path) -> None:
    keys = (api_key("sk-a1", "ann"), api_key("sk-a2", "ann"), api_key("sk-b", "bob"))
    for path in (None, str(tmp_path / "responses.db")):
        config = ServerConfig(api_key=keys, responses_db=path)
        async with _client(_scripted(tokenizer), tokenizer, config, key="sk-a1") as client:
            mine = await client.responses.create(model=MODEL, input="Hi")
            assert (await client.with_options(api_key="sk-a2").responses.retrieve(mine.id)).id == mine.id
            other = client.with_options(api_key="sk-b").responses
            for attempt in (other.retrieve, other.delete, other.input_items.list, other.cancel):
                with pytest.raises(openai.NotFoundError):
                    await attempt(mine.id)
            with pytest.raises(openai.BadRequestError):
                await other.create(model=MODEL, input="Hi", previous_response_id=mine.id)
            assert (await client.responses.retrieve(mine.id)).id == mine.id


@pytest.mark.parametrize(
    ("items", "chat"),
    [
        (
            [
                {"role": "developer", "content": "D"},
                {
                    "type": "message",
                    "role": "user",
                    "content": [{"type": "input_text", "text": t} for t in "AB"],
                },
                {"type": "reasoning", "id": "rs_1", "summary": []},
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "C", "annotations": [], "logprobs": []}],
                },
                {"role": "user", "content": "E"},
            ],
            [
                {"role": "system", "content": "D"},
                {"role": "user", "content": "A\nB"},
                {"role": "assistant", "content": "C"},
                {"role": "user", "content": "E"},
            ],
        ),
    ],
)
async def test_items(tokenizer: Tokenizer, items: list[Any], chat: list[dict[str, Any]]) -> None:
    engine = _scripted(tokenizer)
    async with api(engine, tokenizer) as client:
        response = await client.post("/v1/responses", json={"input": items})
        assert response.status_code == 200, response.text
        path = f"/v1/responses/{response.json()['id']}/input_items?order=asc"
        shown = (await client.get(path)).json()["data"]
        again = await client.post("/v1/responses", json={"input": shown})
    assert list(engine.requests[0].prompt_token_ids) == tokenizer.encode_chat(chat)
    assert engine.requests[1].prompt_token_ids == engine.requests[0].prompt_token_ids
    assert again.status_code == 200
    assert all(item["id"] for item in shown)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "tool", "content": "A"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": "word " * 2000}, "input"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"background": True, "store": False}, "background"),
        ({"background": True, "stream": True}, "stream"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"include": ["everything"]}, "include[0]"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"tool_choice": 5}, "tool_choice"),
    ],
)
async def test_what_is_refused(tokenizer: Tokenizer, fields: dict[str, Any], param: str) -> None:
    engine = _scripted(tokenizer)
    async with api(engine, tokenizer) as client:
        response = await client.post("/v1/responses", json={"input": "Hi"} | fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert not engine.requests
