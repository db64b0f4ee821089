from __future__ import annotations

import pytest

from server.api_keys import api_key
from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.server.http_client import api
from tests.server.in_process_engine import ScriptedEngine, tokens

KEY = api_key("sk-1", "ann")


@pytest.mark.parametrize(
    ("config", "status"),
    [
        (ServerConfig(), 200),
        (ServerConfig(chat_page="on"), 200),
        (ServerConfig(chat_page="off"), 404),
        (ServerConfig(api_key=(KEY,)), 401),
        (ServerConfig(api_key=(KEY,), chat_page="on"), 200),
    ],
)
async def test_who_gets_the_page(config: ServerConfig, status: int, tokenizer: Tokenizer) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer, config) as client:
        for method in ("GET", "HEAD"):
            assert (await client.request(method, "/")).status_code == status
        # TGI's root is no part of it.
        refused = await client.post("/", json={"inputs": "x"})
        assert refused.status_code == (401 if config.api_keys else 200)


async def test_the_page_allows_its_own_script_only(tokenizer: Tokenizer) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        response = await client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert "unsafe" not in policy
    # Nothing is asked of anybody else, and no handler or style hides in an attribute.
    assert "http://" not in response.text
    assert response.text.count("https://") == 0
    assert " onclick=" not in response.text
    assert " style=" not in response.text
