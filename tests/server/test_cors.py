"""What browsers are told about pages of other origins."""

from __future__ import annotations

import pytest

from server.api_keys import api_key
from server.config import ServerConfig
from server.cors import parse_origins
from server.tokenizer import Tokenizer
from tests.server.http_client import api, chat
from tests.server.in_process_engine import ScriptedEngine, tokens

PAGE = "https://chat.example"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}
KEYED = ServerConfig(allowed_origins=(PAGE, "http://localhost:3000"), api_key=(api_key("k"),))


async def test_off_by_default(tokenizer: Tokenizer) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        response = await client.options("/v1/chat/completions", headers=PREFLIGHT)
        assert response.status_code == 405
        other = await client.get("/v1/models", headers={"origin": PAGE})
        for headers in (response.headers, other.headers):
            assert not [name for name in headers if name.startswith("access-control") or name == "vary"]


async def test_a_preflight_needs_no_key(tokenizer: Tokenizer) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer, KEYED) as client:
        response = await client.options("/v1/chat/completions", headers=PREFLIGHT)
        assert (response.status_code, response.content) == (204, b"")
        headers = response.headers
        assert headers["access-control-allow-origin"] == PAGE
        assert headers["access-control-allow-headers"] == "authorization,content-type"
        assert {"POST", "DELETE"} <= set(headers["access-control-allow-methods"].split(", "))
        assert headers["vary"] == "origin"
        assert headers["x-request-id"]
        assert "access-control-allow-credentials" not in headers
        # No preflight, or none that is allowed: the key is asked for as ever.
        for change in ({"origin": "https://evil.example"}, {"origin": "null"}, {"origin": PAGE + ".evil"}):
            response = await client.options("/v1/chat/completions", headers=PREFLIGHT | change)
            assert response.status_code == 401
            assert "access-control-allow-origin" not in response.headers
            assert response.headers["vary"] == "origin"
        response = await client.options("/v1/models", headers={"origin": PAGE})
        assert response.status_code == 401
        response = await client.post("/v1/models", headers=PREFLIGHT)
        assert response.status_code == 401


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_and_errors_can_be_read(tokenizer: Tokenizer, stream: bool) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer, KEYED) as client:
        for key, status in (("k", 200), ("bad", 401)):
            response = await client.post(
                "/v1/chat/completions",
                json=chat(stream=stream),
                headers={"origin": PAGE, "authorization": f"Bearer {key}"},
            )
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == PAGE
            assert "x-request-id" in response.headers["access-control-expose-headers"]
            assert response.headers["vary"] == "origin"


async def test_every_origin(tokenizer: Tokenizer) -> None:
    config = ServerConfig(allowed_origins=("*",))
    async with api(ScriptedEngine(tokens([1])), tokenizer, config) as client:
        response = await client.get("/v1/models", headers={"origin": "null"})
        assert response.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in response.headers
        odd = PREFLIGHT | {"access-control-request-headers": "a\tb"}
        response = await client.options("/v1/models", headers=odd)
        assert response.status_code == 204
        assert "access-control-allow-headers" not in response.headers


@pytest.mark.parametrize(
    "text", ["", ",", "chat.example", PAGE + "/", "https://*.example", "null", "a b://c"]
)
def test_no_origins(text: str) -> None:
    with pytest.raises(ValueError, match="origin"):
        parse_origins(text)
