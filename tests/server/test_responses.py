"""OpenAI's ``/v1/responses``, with its own client and without."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler.messages import EngineOutput, FinishReason, Request, TokenLogprobs
from server.tokenizer import Tokenizer
from tests.server.http_client import MODEL, api, named_events
from tests.server.in_process_engine import ScriptedEngine, scripted_text
from tests.server.responses_client import TEXT, responses_client


async def test_the_client_whole(tokenizer: Tokenizer) -> None:
    engine = scripted_text(tokenizer, TEXT)
    async with responses_client(engine, tokenizer) as client:
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
    async with responses_client(scripted_text(tokenizer, TEXT), tokenizer) as client:
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
    async with api(scripted_text(tokenizer, TEXT), tokenizer) as client:
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
    async with api(scripted_text(tokenizer, TEXT, with_eos=False), tokenizer) as client:
        answer = await client.post("/v1/responses", json={"input": "Hi", "stream": stream})
    if stream:
        name, data = named_events(answer.text)[-1]
        assert name == "response.incomplete"
    response = data["response"] if stream else answer.json()
    assert (response["status"], response["completed_at"]) == ("incomplete", None)
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"


async def test_an_answer_without_text(tokenizer: Tokenizer) -> None:
    async with api(scripted_text(tokenizer, ""), tokenizer) as client:
        whole = (await client.post("/v1/responses", json={"input": "Hi"})).json()
        streamed = await client.post("/v1/responses", json={"input": "Hi", "stream": True})
    assert whole["output"][0]["content"][0]["text"] == ""
    assert "response.output_item.done" in [name for name, _ in named_events(streamed.text)]


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
    engine = scripted_text(thinking, f"<think>Hm.</think>I look.\n{CALL}\n{CALL}")
    async with responses_client(engine, thinking) as client:
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
    engine = scripted_text(thinking, CALL * 2)
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
    engine = scripted_text(tokenizer, TEXT)
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
        (
            [
                {"role": "user", "content": "A"},
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "content": [
                        {"type": "output_text", "text": "B", "annotations": []},
                        {"type": "refusal", "refusal": "C"},
                    ],
                },
                {"role": "user", "content": "D"},
            ],
            [
                {"role": "user", "content": "A"},
                {"role": "assistant", "content": "B\nC"},
                {"role": "user", "content": "D"},
            ],
        ),
    ],
)
async def test_items(tokenizer: Tokenizer, items: list[Any], chat: list[dict[str, Any]]) -> None:
    engine = scripted_text(tokenizer, TEXT)
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
    for item, sent in zip(shown, items, strict=True):
        if "id" in sent and sent["type"] == "message":
            assert [part["type"] for part in item["content"]] == [part["type"] for part in sent["content"]]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "tool", "content": "A"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
        ({"input": [{"type": "item_reference"}]}, "input[0].id"),
        ({"input": [{"type": "computer_call", "id": "cu_1"}]}, "input[0]"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "refusal", "refusal": "A"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"role": "assistant", "content": [{"type": "refusal"}]}]}, "input[0].content[0].refusal"),
        ({"input": [{"role": "assistant", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "assistant", "content": 5}]}, "input[0].content"),
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
    engine = scripted_text(tokenizer, TEXT)
    async with api(engine, tokenizer) as client:
        response = await client.post("/v1/responses", json={"input": "Hi"} | fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert not engine.requests
