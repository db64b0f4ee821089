from __future__ import annotations

import hashlib
import json
import re
from codecs import getincrementaldecoder

import openai
import pytest

from scheduler.messages import EngineOutput, FinishReason, Request, TokenLogprobs
from server.tokenizer import Tokenizer
from tests.server.http_client import MODEL, api, chat, events
from tests.server.in_process_engine import ScriptedEngine, tokens

TEXT = 'Hi "you"\n😀 ü</s>'


def _answering(tokenizer: Tokenizer, text: str = TEXT) -> ScriptedEngine:
    ids = tokenizer.encode(text)
    stop = tokenizer.eos_token_ids[0]
    return ScriptedEngine(tokens(*([i] for i in ids), [stop], finish=FinishReason.STOP, cached=16))


def _fingerprint() -> str:
    return "fp_" + hashlib.sha256(b"0.1.0 scripted none").hexdigest()[:10]


async def test_a_stream_to_the_byte(tokenizer: Tokenizer) -> None:
    async with api(_answering(tokenizer), tokenizer) as client:
        response = await client.post(
            "/v1/chat/completions", json=chat(stream=True, stream_options={"include_usage": True})
        )
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    found = re.search(r'"id":"(chatcmpl-[0-9a-f]{32})".*?"created":(\d+)', response.text)
    assert found is not None
    head = (
        f'{{"id":"{found[1]}","object":"chat.completion.chunk","created":{found[2]},"model":"{MODEL}",'
        f'"system_fingerprint":"{_fingerprint()}","choices":['
    )

    def chunk(delta: str, finish_reason: str = "null") -> str:
        return (
            f'data: {head}{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{finish_reason}}}],'
            '"usage":null}\n\n'
        )

    # As the tokenizer cuts it; a token that ends inside a character gives the text before it.
    decoder = getincrementaldecoder("utf-8")()
    pieces = [text for i in tokenizer.encode(TEXT) if (text := decoder.decode(tokenizer.token_bytes(i)))]
    assert "".join(pieces) == TEXT
    num_tokens = len(tokenizer.encode(TEXT)) + 1
    assert len(pieces) < num_tokens - 1
    num_prompt = len(tokenizer.encode_chat([{"role": "user", "content": "Hi"}]))
    usage = (
        f'{{"prompt_tokens":{num_prompt},"completion_tokens":{num_tokens},'
        f'"total_tokens":{num_prompt + num_tokens},"prompt_tokens_details":{{"cached_tokens":16}}}}'
    )
    assert response.text == "".join(
        [
            chunk('{"role":"assistant","content":""}'),
            *(chunk(f'{{"content":{json.dumps(piece, ensure_ascii=False)}}}') for piece in pieces),
            chunk("{}", '"stop"'),
            f'data: {head}],"usage":{usage}}}\n\n',
            "data: [DONE]\n\n",
        ]
    )


async def test_a_stream_without_usage_has_no_usage_at_all(tokenizer: Tokenizer) -> None:
    async with api(_answering(tokenizer), tokenizer) as client:
        response = await client.post("/v1/chat/completions", json=chat(stream=True))
    assert "usage" not in response.text
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)


async def test_the_whole_answer(tokenizer: Tokenizer) -> None:
    async with api(_answering(tokenizer), tokenizer) as client:
        answer = (await client.post("/v1/chat/completions", json=chat())).json()
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", answer.pop("id"))
    assert answer.pop("created") > 1.7e9
    num_prompt = len(tokenizer.encode_chat([{"role": "user", "content": "Hi"}]))
    num_tokens = len(tokenizer.encode(TEXT)) + 1
    assert answer == {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt + num_tokens,
            "prompt_tokens_details": {"cached_tokens": 16},
        },
        "system_fingerprint": _fingerprint(),
    }


def _with_logprobs(tokenizer: Tokenizer) -> ScriptedEngine:
    ids = [*tokenizer.encode("a 😀"), tokenizer.eos_token_ids[0]]

    def script(request: Request) -> list[EngineOutput]:
        assert request.params.logprobs == 2
        return [
            EngineOutput(
                request.request_id,
                (token_id,),
                logprobs=(TokenLogprobs(token_id, -0.5, 1, ((token_id, -0.5), (7, float("-inf")))),),
                finish_reason=FinishReason.STOP if token_id == ids[-1] else None,
            )
            for token_id in ids
        ]

    return ScriptedEngine(script)


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(tokenizer: Tokenizer, stream: bool) -> None:
    body = chat(stream=stream, logprobs=True, top_logprobs=2)
    async with api(_with_logprobs(tokenizer), tokenizer) as client:
        response = await client.post("/v1/chat/completions", json=body)
    if stream:
        logprobs = [
            chunk["choices"][0]["logprobs"] for chunk in events(response.text)[:-1] if chunk["choices"]
        ]
        assert logprobs[0] is None  # the role chunk
        content = [entry for piece in logprobs if piece is not None for entry in piece["content"]]
    else:
        content = response.json()["choices"][0]["logprobs"]["content"]
    ids = [*tokenizer.encode("a 😀"), tokenizer.eos_token_ids[0]]
    # Every generated token has an entry, parts of characters and the stop token too.
    assert [bytes(entry["bytes"]) for entry in content] == [tokenizer.token_bytes(i) for i in ids]
    assert b"".join(bytes(entry["bytes"]) for entry in content[:-1]).decode() == "a 😀"
    assert all(entry["logprob"] == -0.5 for entry in content)
    first = content[0]
    assert first["top_logprobs"][0] == {"token": "a", "logprob": -0.5, "bytes": [97]}
    assert first["top_logprobs"][1]["logprob"] == -9999.0  # JSON has no infinity
    assert first["token"] == "a"


async def test_the_openai_client_takes_it(tokenizer: Tokenizer) -> None:
    async with (
        api(_with_logprobs(tokenizer), tokenizer) as http,
        openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http) as client,
    ):
        answer = await client.chat.completions.create(**chat(logprobs=True, top_logprobs=2))
        assert answer.choices[0].message.content == "a 😀"
        stream = await client.chat.completions.create(**chat(logprobs=True, top_logprobs=2), stream=True)
        text = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(text) == "a 😀"
