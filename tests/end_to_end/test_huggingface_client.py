"""Hugging Face's client against a real server process with the real default model."""

from __future__ import annotations

import json
from typing import Any

import httpx
from huggingface_hub import AsyncInferenceClient, InferenceClient

from tests.end_to_end.server_process import ServerProcess

PROMPT = "The capital of France is"


def test_text_generation(server: ServerProcess) -> None:
    client = InferenceClient(base_url=server.url)
    whole = client.text_generation(PROMPT, max_new_tokens=12)
    assert "Paris" in whole
    outputs = list(client.text_generation(PROMPT, max_new_tokens=12, stream=True, details=True))
    last = outputs[-1]
    assert last.generated_text == whole
    assert last.details is not None
    assert last.details.generated_tokens == len(outputs)
    assert "".join(output.token.text for output in outputs if not output.token.special) == whole
    assert all(output.token.logprob <= 0 for output in outputs)
    pieces = list(client.text_generation(PROMPT, max_new_tokens=12, stream=True))
    assert pieces == [output.token.text for output in outputs]
    detailed = client.text_generation(PROMPT, max_new_tokens=3, details=True, decoder_input_details=True)
    assert detailed.details is not None
    assert [token.id for token in detailed.details.tokens] == [output.token.id for output in outputs[:3]]
    prompt = httpx.post(f"{server.url}/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    assert [token.id for token in detailed.details.prefill] == prompt
    assert httpx.get(f"{server.url}/info").json()["max_total_tokens"] == 2048


def test_chat_completion(server: ServerProcess) -> None:
    client = InferenceClient(base_url=server.url)
    messages = [{"role": "user", "content": "Name the capital of France."}]
    whole = client.chat_completion(messages, max_tokens=30, temperature=0)
    text = whole.choices[0].message.content
    assert text is not None
    assert "Paris" in text
    chunks = client.chat_completion(messages, max_tokens=30, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


async def test_tools_forms_and_streams_of_chats(server: ServerProcess) -> None:
    properties = {"city": {"enum": ["Paris", "Rome"]}}
    schema: dict[str, Any] = {
        "type": "object", "properties": properties, "required": ["city"], "additionalProperties": False,
    }  # fmt: skip
    tool: Any = {"type": "function", "function": {"name": "get_weather", "parameters": schema}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    messages = [{"role": "user", "content": "What is the weather in Rome?"}]
    client = InferenceClient(base_url=server.url)
    called = client.chat_completion(messages, tools=[tool], tool_choice="required", max_tokens=200)
    choice = called.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    for call in choice.message.tool_calls:
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    formed = client.chat.completions.create(messages=messages, response_format=form, max_tokens=50)
    assert json.loads(formed.choices[0].message.content or "")["city"] in ("Paris", "Rome")
    async with AsyncInferenceClient(base_url=server.url) as asynchronous:
        ask: dict[str, Any] = {"max_tokens": 12, "seed": 3, "temperature": 1.0, "logprobs": True}
        whole = await asynchronous.chat_completion(messages, **ask, top_logprobs=2)
        stream = await asynchronous.chat_completion(messages, **ask, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
