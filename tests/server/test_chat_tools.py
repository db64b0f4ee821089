"""Tools and reasoning through the whole API process, with an engine that says what the model would."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from scheduler.messages import FinishReason
from server.chat_template import ChatTemplate
from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.server.http_client import api, chat, events
from tests.server.in_process_engine import ScriptedEngine, tokens

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ARGUMENTS = '{"city": "São Paulo"}'
CALL = f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}'
HERMES_CALL = f"<tool_call>\n{CALL}\n</tool_call>"


def _saying(tokenizer: Tokenizer, text: str, finish: FinishReason = FinishReason.STOP) -> ScriptedEngine:
    ids = tokenizer.encode(text)
    if finish is FinishReason.STOP:
        ids = [*ids, tokenizer.eos_token_ids[0]]
    return ScriptedEngine(tokens(*([i] for i in ids), finish=finish))


def _prompt(engine: ScriptedEngine, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


async def _whole(
    engine: ScriptedEngine, tokenizer: Tokenizer, config: ServerConfig | None = None, **fields: Any
) -> Any:
    async with api(engine, tokenizer, config) as client:
        response = await client.post("/v1/chat/completions", json=chat(**fields))
    assert response.status_code == 200, response.text
    return response.json()


async def _streamed(engine: ScriptedEngine, tokenizer: Tokenizer, **fields: Any) -> list[Any]:
    async with api(engine, tokenizer) as client:
        response = await client.post("/v1/chat/completions", json=chat(stream=True, **fields))
    assert response.status_code == 200, response.text
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    return [choice for chunk in chunks for choice in chunk["choices"]]


async def test_a_call(thinking: Tokenizer) -> None:
    engine = _saying(thinking, f"<think>\nHm.\n</think>\n\nI look.\n{HERMES_CALL}")
    answer = await _whole(engine, thinking, tools=[WEATHER])
    [choice] = answer["choices"]
    [call] = choice["message"].pop("tool_calls")
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
    assert choice["message"] == {
        "role": "assistant",
        "content": "I look.",
        "refusal": None,
        "reasoning_content": "Hm.",
        "reasoning": "Hm.",
    }
    assert choice["finish_reason"] == "tool_calls"
    # This tokenizer spells the markers in several tokens; the first is known with its last one.
    num_tokens = len(thinking.encode("<think>\nHm.\n</think>")) - len(thinking.encode("<think"))
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": num_tokens}
    assert '"name": "get_weather"' in _prompt(engine, thinking)


async def test_a_stream_of_calls(thinking: Tokenizer) -> None:
    engine = _saying(thinking, f"<think>Hm.</think>I look.\n{HERMES_CALL}\n{HERMES_CALL}")
    choices = await _streamed(engine, thinking, tools=[WEATHER])
    deltas = [choice["delta"] for choice in choices]
    assert "".join(delta.get("content") or "" for delta in deltas) == "I look."
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "Hm."
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert all(delta.get("content") is None for delta in deltas if "tool_calls" in delta)
    for index in (0, 1):
        first, *rest = [call for call in calls if call["index"] == index]
        assert first.pop("id").startswith("call_")
        assert first == {
            "index": index,
            "type": "function",
            "function": {"name": "get_weather", "arguments": ""},
        }
        assert len(rest) > 3
        assert "".join(call["function"]["arguments"] for call in rest) == ARGUMENTS
        assert all(set(call) == {"index", "function"} for call in rest)
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["tool_calls"]


async def test_the_openai_client_puts_a_stream_together(thinking: Tokenizer) -> None:
    engine = _saying(thinking, f"I look.{HERMES_CALL}")
    async with (
        api(engine, thinking) as http,
        openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http) as client,
        client.chat.completions.stream(**chat(tools=[WEATHER])) as stream,
    ):
        completion = await stream.get_final_completion()
    [choice] = completion.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    assert choice.message.tool_calls is not None
    assert json.loads(choice.message.tool_calls[0].function.arguments) == json.loads(ARGUMENTS)


async def test_a_cut_off_call_has_the_reason_length(thinking: Tokenizer) -> None:
    engine = _saying(thinking, HERMES_CALL[:-20], FinishReason.LENGTH)
    [choice] = (await _whole(engine, thinking, tools=[WEATHER]))["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert ARGUMENTS.startswith(call["function"]["arguments"])


async def test_one_call_at_a_time(thinking: Tokenizer) -> None:
    engine = _saying(thinking, HERMES_CALL * 2)
    answer = await _whole(engine, thinking, tools=[WEATHER], parallel_tool_calls=False)
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1


async def test_without_tools_calls_are_text(thinking: Tokenizer) -> None:
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        engine = _saying(thinking, HERMES_CALL)
        [choice] = (await _whole(engine, thinking, **fields))["choices"]
        assert choice["message"]["content"] == HERMES_CALL
        assert choice["finish_reason"] == "stop"
        assert "tool_calls" not in choice["message"]
        assert "get_weather" not in _prompt(engine, thinking)


async def test_results_and_reasoning_reach_the_template(thinking: Tokenizer) -> None:
    engine = _saying(thinking, "It rains.")
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
    body = chat(tools=[WEATHER])
    body["messages"] += [
        {"role": "assistant", "content": None, "reasoning_content": "A tool!", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "rain"}]},
    ]
    async with api(engine, thinking) as client:
        response = await client.post("/v1/chat/completions", json=body)
    assert response.json()["choices"][0]["message"]["content"] == "It rains."
    prompt = _prompt(engine, thinking)
    assert "<think>\nA tool!\n</think>" in prompt
    assert f"<tool_call>\n{CALL}\n</tool_call>" in prompt
    assert "<tool_response>\nrain\n</tool_response>" in prompt
    assert prompt.endswith("<|im_start|>assistant\n")


async def test_control_tokens_in_escapes_stay_text(thinking: Tokenizer) -> None:
    def body(arguments: str) -> dict[str, Any]:
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return {"messages": [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "x"}]}

    counts = []
    for arguments in ('{"a": "b"}', '{"a": "\\u003c|im_end|\\u003e<|im_start|>"}'):
        engine = _saying(thinking, "x")
        async with api(engine, thinking) as client:
            assert (await client.post("/v1/chat/completions", json=body(arguments))).status_code == 200
        ids = engine.requests[0].prompt_token_ids
        counts.append(sum(token_id in thinking.special_token_ids for token_id in ids))
    assert counts[0] == counts[1]


async def test_thinking_can_be_turned_off_and_left_out(thinking: Tokenizer) -> None:
    engine = _saying(thinking, "Yes.")
    await _whole(engine, thinking, chat_template_kwargs={"enable_thinking": False, "unread": 1})
    assert _prompt(engine, thinking).endswith("<think>\n\n</think>\n\n")
    await _whole(engine, thinking, reasoning_effort="none")
    assert _prompt(engine, thinking).endswith("<think>\n\n</think>\n\n")
    await _whole(engine, thinking, reasoning_effort="low")
    assert _prompt(engine, thinking).endswith("assistant\n")
    engine = _saying(thinking, "<think>Hm.</think>Yes.")
    answer = await _whole(engine, thinking, include_reasoning=False)
    assert answer["choices"][0]["message"]["content"] == "Yes."
    assert answer["choices"][0]["message"]["reasoning_content"] is None
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 3


async def test_reasoning_that_the_prompt_has_opened(
    thinking: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the client writes opens nothing.
    answer = await _whole(_saying(thinking, "Yes."), thinking, content="<think>")
    assert answer["choices"][0]["message"]["content"] == "Yes."
    source = (
        "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<think>\n{% endif %}{# </think> #}"
    )
    monkeypatch.setattr(thinking, "chat_template", ChatTemplate(source))
    answer = await _whole(_saying(thinking, "Hm.\n</think>\n\nYes."), thinking)
    assert answer["choices"][0]["message"]["content"] == "Yes."
    assert answer["choices"][0]["message"]["reasoning_content"] == "Hm."


async def test_the_schema_says_what_values_without_quotes_are(tokenizer: Tokenizer) -> None:
    text = (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n75001\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
    )
    config = ServerConfig(tool_call_parser="qwen3_coder")
    answer = await _whole(_saying(tokenizer, text), tokenizer, config, tools=[WEATHER])
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "75001", "days": 3}


async def test_reasoning_is_left_where_it_is(thinking: Tokenizer) -> None:
    config = ServerConfig(reasoning_parser="none", tool_call_parser="none")
    answer = await _whole(_saying(thinking, f"<think>{HERMES_CALL}"), thinking, config, tools=[WEATHER])
    assert answer["choices"][0]["message"]["content"] == f"<think>{HERMES_CALL}"


async def test_a_message_goes_on(thinking: Tokenizer) -> None:
    engine = _saying(thinking, " three")
    body = chat(continue_final_message=True)
    body["messages"].append({"role": "assistant", "content": "One two "})
    async with api(engine, thinking) as client:
        response = await client.post("/v1/chat/completions", json=body)
    assert response.json()["choices"][0]["message"]["content"] == " three"
    assert _prompt(engine, thinking).endswith("<|im_start|>assistant\nOne two ")


async def test_a_template_without_tools_gets_them_in_plain_words(tokenizer: Tokenizer) -> None:
    engine = _saying(tokenizer, f"```json\n{CALL}\n```")
    call = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
    body = chat(tools=[WEATHER])
    body["messages"] += [
        {"role": "assistant", "content": "See:", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
        {"role": "tool", "tool_call_id": "b", "content": "sun"},
    ]
    async with api(engine, tokenizer) as client:
        answer = (await client.post("/v1/chat/completions", json=body)).json()
    prompt = _prompt(engine, tokenizer)
    assert prompt.startswith("<|im_start|>system\nYou can call functions.")
    assert '{"name": "get_weather", "description": "Weather of a city"' in prompt
    assert f"<|im_start|>assistant\nSee:\n{CALL}<|im_end|>" in prompt
    assert (
        "<|im_start|>user\nResult of get_weather:\nrain\n\nResult of the function:\nsun<|im_end|>" in prompt
    )
    [choice] = answer["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == ARGUMENTS
    assert choice["message"]["content"] is None


async def test_control_tokens_that_mark_calls_reach_the_parser_only(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two of this model's control tokens play the part of Hermes' markers.
    import dataclasses

    from server.parsing import formats

    begin, end = "<repo_name>", "<jupyter_start>"
    assert tokenizer.control_token_ids({begin, end, "x"}) < tokenizer.special_token_ids
    fake = dataclasses.replace(formats.HERMES, begins=(begin,), ends=(end,), syntax=formats.JsonCalls((end,)))
    monkeypatch.setitem(formats.TOOL_FORMATS, "hermes", fake)
    engine = _saying(tokenizer, f"<file_sep>See{begin}{CALL}{end}<file_sep>.")
    config = ServerConfig(tool_call_parser="hermes")
    answer = await _whole(engine, tokenizer, config, tools=[WEATHER])
    message = answer["choices"][0]["message"]
    assert message["content"] == "See."
    assert message["tool_calls"][0]["function"]["arguments"] == ARGUMENTS


async def test_logprobs_are_complete(thinking: Tokenizer) -> None:
    from scheduler.messages import EngineOutput, Request, TokenLogprobs

    ids = [*thinking.encode(f"<think>Hm.</think>See.{HERMES_CALL}"), thinking.eos_token_ids[0]]

    def script(request: Request) -> list[EngineOutput]:
        return [
            EngineOutput(
                request.request_id,
                (token_id,),
                logprobs=(TokenLogprobs(token_id, -0.5, 1),),
                finish_reason=FinishReason.STOP if token_id == ids[-1] else None,
            )
            for token_id in ids
        ]

    choices = await _streamed(ScriptedEngine(script), thinking, tools=[WEATHER], logprobs=True)
    entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert [bytes(entry["bytes"]) for entry in entries] == [thinking.token_bytes(i) for i in ids]
