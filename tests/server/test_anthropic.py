"""Anthropic's API, with its own client and without."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic

from scheduler.messages import EngineOutput, Request
from server.api_keys import api_key
from server.app import create_app
from server.config import ServerConfig
from server.errors import EngineDeadError
from server.tokenizer import Tokenizer
from tests.server.http_client import MODEL, api, named_events, serving
from tests.server.in_process_engine import ScriptedEngine, scripted_text

HELLO = [{"role": "user", "content": "Hi"}]
TEXT = "Paris is 🙂 the capital."
BODY: dict[str, Any] = {"model": MODEL, "max_tokens": 50, "messages": HELLO}


def _scripted(tokenizer: Tokenizer, text: str = TEXT, *, with_eos: bool = True) -> ScriptedEngine:
    return scripted_text(tokenizer, text, with_eos=with_eos)


@asynccontextmanager
async def _client(
    engine: ScriptedEngine, tokenizer: Tokenizer, config: ServerConfig | None = None, key: str = "none"
) -> AsyncIterator[AsyncAnthropic]:
    async with (
        serving(create_app(config or ServerConfig(), engine, tokenizer)) as port,
        AsyncAnthropic(base_url=f"http://127.0.0.1:{port}", api_key=key, max_retries=0) as client,
    ):
        yield client


async def test_the_client_whole(tokenizer: Tokenizer) -> None:
    engine = _scripted(tokenizer)
    async with _client(engine, tokenizer) as client:
        message = await client.messages.create(**BODY)
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text == TEXT
    assert (message.role, message.type, message.model) == ("assistant", "message", MODEL)
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.id.startswith("msg_")
    num_prompt = len(tokenizer.encode_chat(HELLO))
    assert message.usage.input_tokens == num_prompt - 16
    assert message.usage.cache_read_input_tokens == 16
    assert message.usage.output_tokens == len(tokenizer.encode(TEXT)) + 1


async def test_the_client_streaming(tokenizer: Tokenizer) -> None:
    engine = _scripted(tokenizer)
    async with _client(engine, tokenizer) as client:
        async with client.messages.stream(**BODY) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            message = await stream.get_final_message()
        whole = await client.messages.create(**BODY)
    assert text == TEXT
    assert message.model_dump(exclude={"id"}) == whole.model_dump(exclude={"id"})


async def test_the_order_of_events(tokenizer: Tokenizer) -> None:
    async with api(_scripted(tokenizer), tokenizer) as client:
        response = await client.post("/v1/messages", json=BODY | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = named_events(response.text)
    names = [name for name, _ in events]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[3:-3]) == {"content_block_delta"}
    assert all(data["type"] == name for name, data in events)
    assert all(data["index"] == 0 for name, data in events if name.startswith("content_block"))
    assert events[0][1]["message"]["usage"]["cache_read_input_tokens"] == 16
    assert events[-2][1]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


async def test_an_answer_without_text_has_a_block(tokenizer: Tokenizer) -> None:
    async with api(_scripted(tokenizer, ""), tokenizer) as client:
        response = await client.post("/v1/messages", json=BODY | {"stream": True})
        names = [name for name, _ in named_events(response.text)]
        assert names[2:4] == ["content_block_start", "content_block_stop"]
        whole = (await client.post("/v1/messages", json=BODY)).json()
    assert whole["content"] == [{"type": "text", "text": ""}]


@pytest.mark.parametrize("stream", [False, True])
async def test_reasons_to_stop(tokenizer: Tokenizer, stream: bool) -> None:
    async def end(engine: ScriptedEngine, **fields: Any) -> tuple[str, Any, Any]:
        async with api(engine, tokenizer) as client:
            response = await client.post("/v1/messages", json=BODY | {"stream": stream, **fields})
        if not stream:
            message = response.json()
            return message["content"][0]["text"], message["stop_reason"], message["stop_sequence"]
        events = named_events(response.text)
        text = "".join(data["delta"]["text"] for name, data in events if name == "content_block_delta")
        delta = events[-2][1]["delta"]
        return text, delta["stop_reason"], delta["stop_sequence"]

    assert await end(_scripted(tokenizer)) == (TEXT, "end_turn", None)
    assert await end(_scripted(tokenizer, with_eos=False)) == (TEXT, "max_tokens", None)
    engine = _scripted(tokenizer)
    assert await end(engine, stop_sequences=["x", " the"]) == ("Paris is 🙂", "stop_sequence", " the")
    assert engine.aborted


async def test_what_the_engine_is_asked_for(tokenizer: Tokenizer) -> None:
    engine = _scripted(tokenizer)
    async with api(engine, tokenizer) as client:
        for fields in ({}, {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_tokens": 3}):
            assert (await client.post("/v1/messages", json=BODY | fields)).status_code == 200
    first, second = (request.params for request in engine.requests)
    assert (first.temperature, first.top_p, first.top_k, first.max_tokens) == (1.0, 1.0, 0, 50)
    assert (second.temperature, second.top_p, second.top_k, second.max_tokens) == (0.5, 0.9, 7, 3)


@pytest.mark.parametrize(
    ("fields", "chat"),
    [
        (
            {"system": "Be brief."},
            [{"role": "system", "content": "Be brief."}, *HELLO],
        ),
        (
            {"system": [{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}]},
            [{"role": "system", "content": "Be"}, *HELLO],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "A"},
                    {"role": "user", "content": [{"type": "text", "text": "B"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "C"}]},
                    {"role": "assistant", "content": "D"},
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": [{"type": "text", "text": t} for t in "EF"]},
                ]
            },
            [
                {"role": "user", "content": "A\nB"},
                {"role": "assistant", "content": "C\nD"},
                {"role": "system", "content": "S"},
                {"role": "user", "content": "E\nF"},
            ],
        ),
    ],
)
async def test_prompts(tokenizer: Tokenizer, fields: dict[str, Any], chat: list[dict[str, Any]]) -> None:
    engine = _scripted(tokenizer)
    async with _client(engine, tokenizer) as client:
        await client.messages.create(**BODY | fields)
        body = {"model": MODEL, "messages": HELLO} | fields
        counted = await client.messages.count_tokens(**body)
    expected = tokenizer.encode_chat(chat)
    assert list(engine.requests[0].prompt_token_ids) == expected
    assert counted.input_tokens == len(expected)


async def test_an_answer_goes_on_from_the_last_message(tokenizer: Tokenizer) -> None:
    engine = _scripted(tokenizer, " capital is Paris.")
    messages = [*HELLO, {"role": "assistant", "content": "The"}]
    async with _client(engine, tokenizer) as client:
        message = await client.messages.create(**BODY | {"messages": messages})
    prompt = tokenizer.decode(engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt.endswith("assistant\nThe")
    assert message.content[0].text == " capital is Paris."


WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "São Paulo"}}\n</tool_call>'


async def test_thinking_text_and_calls(thinking: Tokenizer) -> None:
    engine = _scripted(thinking, f"<think>Hm.</think>I look.\n{CALL}\n{CALL}")
    async with _client(engine, thinking) as client:
        whole = await client.messages.create(**BODY, tools=[WEATHER])
        async with client.messages.stream(**BODY, tools=[WEATHER]) as stream:
            streamed = await stream.get_final_message()
    for message in (whole, streamed):
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
        thought, text, first, second = message.content
        assert (thought.thinking, text.text) == ("Hm.", "I look.")
        for block in (first, second):
            assert (block.name, block.input) == ("get_weather", {"city": "São Paulo"})
        assert first.id != second.id
        assert message.stop_reason == "tool_use"
        assert message.usage.output_tokens_details.thinking_tokens > 0
    prompt = thinking.decode(engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert '"name": "get_weather"' in prompt
    assert '"description": "Weather of a city"' in prompt


async def test_models(tokenizer: Tokenizer) -> None:
    config = ServerConfig(served_model_name=("org/main", "alias"))
    async with _client(_scripted(tokenizer), tokenizer, config) as client:
        models = [model async for model in client.models.list()]
        model = await client.models.retrieve("org/main")
    assert [(each.id, each.display_name, each.type) for each in models] == [
        ("org/main", "org/main", "model"),
        ("alias", "alias", "model"),
    ]
    assert model == models[0]
    assert model.lifecycle == "active"
    assert abs(model.created_at.timestamp() - time.time()) < 60


async def test_blocks_are_told_one_after_the_other(thinking: Tokenizer) -> None:
    async with api(_scripted(thinking, f"<think>Hm.</think>I look.{CALL}"), thinking) as client:
        response = await client.post("/v1/messages", json=BODY | {"stream": True, "tools": [WEATHER]})
    told = [(name, data["index"]) for name, data in named_events(response.text) if name.startswith("content")]
    assert [index for _, index in told] == sorted(index for _, index in told)
    for index in range(3):
        names = [name for name, i in told if i == index]
        assert names[0] == "content_block_start"
        assert names[-1] == "content_block_stop"
        assert set(names[1:-1]) == {"content_block_delta"}


async def test_a_call_that_is_cut_off(thinking: Tokenizer) -> None:
    engine = _scripted(thinking, CALL[: CALL.index("Paulo")], with_eos=False)
    async with _client(engine, thinking) as client:
        message = await client.messages.create(**BODY, tools=[WEATHER])
    assert message.stop_reason == "max_tokens"
    assert message.content[0].input == {}


async def test_results_of_calls(thinking: Tokenizer) -> None:
    engine = _scripted(thinking)
    messages: list[Any] = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "redacted_thinking", "data": "abc"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [{"type": "text", "text": "Sun"}],
                },
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    function = {"name": WEATHER["name"], "description": WEATHER["description"]}
    tool = {"type": "function", "function": {**function, "parameters": WEATHER["input_schema"]}}
    call = {"name": "get_weather", "arguments": '{"city":"Rome"}'}
    chat = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "toolu_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "Sun"},
        {"role": "user", "content": "And?"},
    ]
    async with _client(engine, thinking) as client:
        await client.messages.create(**BODY | {"messages": messages}, tools=[WEATHER])
        counted = await client.messages.count_tokens(model=MODEL, messages=messages, tools=[WEATHER])
    async with api(engine, thinking) as http:
        body = {"messages": chat, "tools": [tool]}
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    ours, openais = (request.prompt_token_ids for request in engine.requests)
    assert thinking.decode(ours) == thinking.decode(openais)
    assert counted.input_tokens == len(ours)


async def test_choices_of_tools(thinking: Tokenizer) -> None:
    engine = _scripted(thinking, f"Look: {CALL}{CALL}")
    async with _client(engine, thinking) as client:

        async def calls(**choice: Any) -> int:
            message = await client.messages.create(**BODY, tools=[WEATHER], tool_choice=choice)  # type: ignore[call-overload]
            return sum(block.type == "tool_use" for block in message.content)

        assert await calls(type="auto") == 2
        assert await calls(type="auto", disable_parallel_tool_use=True) == 1
        assert await calls(type="none") == 0
        for wrong in ({"type": "tool"}, {"type": "tool", "name": "other"}):
            with pytest.raises(anthropic.BadRequestError, match="tool_choice"):
                await calls(**wrong)


async def test_what_coding_agents_send(thinking: Tokenizer) -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    body = BODY | {
        "system": [{"type": "text", "text": "You code.", **cached}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", **cached}]}],
        "tools": [WEATHER | {"input_schema": {"$schema": "x", **WEATHER["input_schema"]}, **cached}],
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "medium"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": "u"},
        "stream": True,
    }
    async with api(_scripted(thinking, f"<think>Hm.</think>{CALL}"), thinking) as client:
        headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "x,y", "x-api-key": "none"}
        response = await client.post("/v1/messages?beta=true", json=body, headers=headers)
    names = [name for name, _ in named_events(response.text)]
    assert names[-1] == "message_stop"
    assert names.count("content_block_start") == 2


async def test_thinking_is_switched(thinking: Tokenizer) -> None:
    engine = _scripted(thinking, "<think>Hm.</think>Yes.")
    async with _client(engine, thinking) as client:
        on = await client.messages.create(**BODY, thinking={"type": "enabled", "budget_tokens": 1024})
        off = await client.messages.create(**BODY, thinking={"type": "disabled"})
    assert [block.type for block in on.content] == ["thinking", "text"]
    assert [block.type for block in off.content] == ["text"]
    first, second = (thinking.decode(r.prompt_token_ids) for r in engine.requests)
    assert first != second


async def test_counting_needs_no_room(tokenizer: Tokenizer) -> None:
    long = [{"role": "user", "content": "word " * 2000}]
    async with _client(_scripted(tokenizer), tokenizer) as client:
        with pytest.raises(anthropic.BadRequestError, match="context is 512 tokens"):
            await client.messages.create(**BODY | {"messages": long})
        counted = await client.messages.count_tokens(model=MODEL, messages=long)
    assert counted.input_tokens == len(tokenizer.encode_chat(long))


REDACTED = {"type": "redacted_thinking", "data": "abc"}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens to at most"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "A"}]}, "messages[0].role"),
        ({"output_config": {"format": {"type": "json"}}}, "output_config.format.type"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"text": "A"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "A"}]}]},
            "no blocks of type 'thinking'",
        ),
        (
            {
                "messages": [
                    *HELLO,
                    {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}]},
                ]
            },
            "cannot go on from the last message",
        ),
        ({"messages": [{"role": "assistant", "content": [REDACTED]}]}, "cannot go on from the last message"),
        (
            {"messages": [*HELLO, {"role": "assistant", "content": [REDACTED]}]},
            "cannot go on from the last message",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, ""),
        ({"temperature": 1.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"system": 5}, "system"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
    ],
)
async def test_what_is_refused(tokenizer: Tokenizer, fields: dict[str, Any], says: str) -> None:
    engine = _scripted(tokenizer)
    async with api(engine, tokenizer) as client:
        response = await client.post(
            "/v1/messages", content=json.dumps(BODY | fields), headers={"content-type": "application/json"}
        )
    assert response.status_code == 400
    error = response.json()
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert says in error["error"]["message"]
    assert error["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    assert not engine.requests


async def test_errors_reach_the_client(tokenizer: Tokenizer) -> None:
    async def stream_all(client: AsyncAnthropic) -> None:
        async with client.messages.stream(**BODY) as stream:
            await stream.until_done()

    engine = _scripted(tokenizer)
    async with _client(engine, tokenizer) as client:
        with pytest.raises(anthropic.NotFoundError, match="does not exist") as missing:
            await client.messages.create(**BODY | {"model": "another"})
        assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
        working = engine.script

        def breaks(request: Request) -> list[EngineOutput | Exception]:
            return [*list(working(request))[:2], RuntimeError("/secret/path")]  # type: ignore[list-item]

        engine.script = breaks
        with pytest.raises(anthropic.APIStatusError, match="had an error") as broken:
            await stream_all(client)
        assert "secret" not in str(broken.value.body)
        assert broken.value.body["error"]["type"] == "api_error"  # type: ignore[index]
        with pytest.raises(anthropic.InternalServerError):
            await client.messages.create(**BODY)
        engine.script = lambda request: [EngineDeadError("/secret/path")]
        with pytest.raises(anthropic.InternalServerError) as dead:
            await stream_all(client)
        assert dead.value.body["error"]["type"] == "overloaded_error"  # type: ignore[index]


async def test_keys_and_paths(tokenizer: Tokenizer) -> None:
    config = ServerConfig(api_key=(api_key("sk-good"),))
    async with _client(_scripted(tokenizer), tokenizer, config, key="sk-good") as client:
        assert (await client.messages.create(**BODY)).stop_reason == "end_turn"
        with pytest.raises(anthropic.AuthenticationError) as refused:
            await client.with_options(api_key="sk-bad").messages.create(**BODY)
        assert refused.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
    async with api(_scripted(tokenizer), tokenizer) as http:
        wrong = await http.get("/v1/messages")
        assert (wrong.status_code, wrong.json()["type"]) == (405, "error")
        assert (await http.get("/v1/messages/batches")).json()["error"]["type"] == "not_found_error"
        assert "type" not in (await http.get("/v1/messagesx")).json()
