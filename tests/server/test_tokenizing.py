"""/tokenize and /detokenize against the tokenizer itself."""

from __future__ import annotations

from typing import Any

import pytest

from server.tokenizer import Tokenizer
from tests.server.http_client import MODEL, api, chat
from tests.server.in_process_engine import SPEC, ScriptedEngine, tokens

# Longer than the context of 512 tokens, of two lengths of UTF-8.
TEXTS = ["", "Hello world", "Grüße <|im_start|> 世界 🙂", "word " * 600]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [None, True, False])
async def test_texts_there_and_back(tokenizer: Tokenizer, text: str, special: bool | None) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        body = {"model": MODEL, "prompt": text, "add_special_tokens": special}
        response = await client.post("/tokenize", json=body)
        assert response.status_code == 200
        answer = response.json()
        ids = tokenizer.encode(text, add_special_tokens=special is not False)
        assert answer == {
            "count": len(ids),
            "max_model_len": SPEC.max_model_len,
            "tokens": ids,
            "token_strs": None,
        }
        back = await client.post("/detokenize", json={"tokens": ids})
        assert (back.status_code, back.json()) == (200, {"prompt": text})


async def test_names_of_tokens(tokenizer: Tokenizer) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        body = {"prompt": "Hello world", "return_token_strs": True}
        assert (await client.post("/tokenize", json=body)).json()["token_strs"] == ["Hello", "Ġworld"]


@pytest.mark.parametrize("generation", [None, True, False])
async def test_chats(tokenizer: Tokenizer, generation: bool | None) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi <|im_end|>"}]}]
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        answer = (
            await client.post("/tokenize", json={"messages": messages, "add_generation_prompt": generation})
        ).json()
    plain = [{"role": "user", "content": "Hi <|im_end|>"}]
    assert answer["tokens"] == tokenizer.encode_chat(plain, add_generation_prompt=generation is not False)


async def test_a_chat_counts_what_its_completion_costs(tokenizer: Tokenizer) -> None:
    async with api(ScriptedEngine(tokens([28])), tokenizer) as client:
        counted = (await client.post("/tokenize", json=chat("How much?"))).json()["count"]
        answer = (await client.post("/v1/chat/completions", json=chat("How much?"))).json()
    assert counted == answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/tokenize", {}, "prompt", "missing_required_parameter"),
        ("/tokenize", {"prompt": ["a"]}, "prompt", "invalid_type"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens", "invalid_type"),
        ("/tokenize", {"prompt": "a", "messages": []}, "messages", "invalid_value"),
        ("/tokenize", {"messages": []}, "messages", "array_below_min_length"),
        ("/tokenize", chat(tools=[{}]), "tools[0].type", "missing_required_parameter"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ("/tokenize", {"prompt": "x" * 20_000_000}, "prompt", "context_length_exceeded"),
        ("/detokenize", {}, "tokens", "missing_required_parameter"),
        ("/detokenize", {"tokens": "1"}, "tokens", "invalid_type"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]", "integer_below_min_value"),
        ("/detokenize", {"tokens": [1, True]}, "tokens[1]", "invalid_type"),
        ("/detokenize", {"tokens": [1, SPEC.vocab_size]}, "tokens[1]", "integer_above_max_value"),
        ("/detokenize", {"tokens": [0] * (2**20 + 1)}, "tokens", "array_above_max_length"),
    ],
)
async def test_what_is_refused(
    tokenizer: Tokenizer, path: str, body: dict[str, Any], param: str, code: str
) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


async def test_another_model(tokenizer: Tokenizer) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": []})):
            assert (await client.post(path, json=body | {"model": "other"})).status_code == 404
            assert (await client.post(path, json=body)).status_code == 200
