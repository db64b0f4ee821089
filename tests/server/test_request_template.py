"""Chat templates that come with a request."""

from __future__ import annotations

from typing import Any

import pytest

from server.config import ServerConfig
from server.request_template import RequestTemplates
from server.tokenizer import Tokenizer
from tests.server.http_client import api, chat
from tests.server.in_process_engine import ScriptedEngine, tokens

TRUSTING = ServerConfig(trust_request_chat_template=True)
PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ voice or 'answer' }}:{% endif %}{{ bos_token }}"
)


async def _post(engine: ScriptedEngine, tokenizer: Tokenizer, **fields: Any) -> dict[str, Any]:
    async with api(engine, tokenizer, TRUSTING) as client:
        response = await client.post("/v1/chat/completions", json=chat(**fields))
        answer: dict[str, Any] = response.json()
        return answer


async def test_it_takes_the_place_of_the_models(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokens([5]))
    bos = tokenizer.named_special_tokens["bos_token"]
    for kwargs, voice in (({}, "answer"), ({"voice": "echo", "self": 1}, "echo")):
        await _post(engine, tokenizer, content="Hi", chat_template=PLAIN, chat_template_kwargs=kwargs)
        expected = tokenizer.encode(f"user: Hi<|im_end|>{voice}:{bos}", add_special_tokens=False)
        assert engine.requests[-1].prompt_token_ids == tuple(expected)
    await _post(
        engine, tokenizer, content="Hi", chat_template=PLAIN, add_generation_prompt=False,
        continue_final_message=True,
    )  # fmt: skip
    expected = tokenizer.encode("user: Hi", add_special_tokens=False)
    assert engine.requests[-1].prompt_token_ids == tuple(expected)


async def test_control_tokens_of_messages_stay_text(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokens([5]))
    await _post(engine, tokenizer, content="a<|im_end|>b", chat_template=PLAIN)
    [end] = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    assert engine.requests[0].prompt_token_ids.count(end) == 1


async def test_tokenize_takes_it_too(tokenizer: Tokenizer) -> None:
    async with api(ScriptedEngine(tokens([5])), tokenizer, TRUSTING) as client:
        answer = await client.post("/tokenize", json=chat("Hi", chat_template="{{ messages[0].content }}"))
        assert answer.json()["tokens"] == tokenizer.encode("Hi", add_special_tokens=False)


async def test_those_that_are_no_good(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokens([5]))
    async with api(engine, tokenizer, TRUSTING) as client:
        for template, message in (
            ("{% for %}", "is not valid Jinja"),
            ("{{ raise_exception('no' * 9999) }}", "refuses these messages: nono"),
            ("{{ ''.__class__.__mro__ }}", "fails on these messages"),
            ("{{ messages[0].content.missing.deeper }}", "needs something"),
            ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "too much"),
            (
                "{% set x = namespace(a='x') %}{% for i in range(50) %}{% set x.a = x.a + x.a %}{% endfor %}",
                "",
            ),
        ):
            response = await client.post("/v1/chat/completions", json=chat("Hi", chat_template=template))
            assert response.status_code == 400, response.text
            error = response.json()["error"]
            assert (error["param"], error["code"]) == ("chat_template", "invalid_value")
            assert message in error["message"]
            assert "model's" not in error["message"]
            assert len(error["message"]) < 400
        assert engine.requests == []
        response = await client.post("/v1/chat/completions", json=chat("Hi", chat_template=PLAIN))
        assert response.status_code == 200


async def test_one_that_is_too_long(tokenizer: Tokenizer) -> None:
    error = (await _post(ScriptedEngine(tokens([5])), tokenizer, chat_template="x" * 70_000))["error"]
    assert (error["param"], error["code"]) == ("chat_template", "string_above_max_length")


async def test_the_refusal_names_the_flag(tokenizer: Tokenizer) -> None:
    async with api(ScriptedEngine(tokens([5])), tokenizer) as client:
        for path in ("/v1/chat/completions", "/tokenize"):
            response = await client.post(path, json=chat("Hi", chat_template=PLAIN))
            assert response.status_code == 400
            assert "--trust-request-chat-template" in response.json()["error"]["message"]


def test_a_lost_process_is_started_again(tokenizer: Tokenizer) -> None:
    templates = RequestTemplates({"bos_token": "<s>"})
    messages = [{"role": "user", "content": "Hi \ud800 é"}]
    assert templates.render("{{ bos_token }}{{ messages[0].content }}", messages, {}) == "<s>Hi \ud800 é"
    process = templates._process._process
    assert process is not None
    process.kill()
    process.wait()
    with pytest.raises(Exception, match="takes too much"):
        templates.render("x", messages, {})
    assert templates.render("y", messages, {}) == "y"
    templates.close()
