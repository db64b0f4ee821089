"""Who is let in, and what keys must not show up in."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from server import cli
from server.api_keys import ApiKeys, api_key, parse_api_keys, read_api_keys
from server.app import create_app
from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.server.http_client import api, chat, serving
from tests.server.in_process_engine import ScriptedEngine, tokens
from tests.server.test_guard import LIMIT, exchange, post_head

GOOD, OTHER = "sk-good-1", "sk-other-2"
CONFIG = ServerConfig(api_key=(api_key(GOOD),), max_body_bytes=LIMIT)


def _every_route(app: FastAPI) -> Iterator[tuple[str, str]]:
    for route in iter_route_contexts(app.routes):
        for method in sorted(route.methods or ()):
            yield method, re.sub(r"\{[^}]*\}", "x", str(route.path))


def _bearer(key: str | bytes) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + (key.encode() if isinstance(key, str) else key)}


BAD: list[dict[bytes, bytes]] = [
    {},
    _bearer(""),
    _bearer(GOOD + "x"),
    _bearer(GOOD[:-1]),
    _bearer(GOOD.upper()),
    _bearer("x" * 2**20),
    _bearer("schlüssel"),
    _bearer(b"\xff\xfe"),
    {b"authorization": GOOD.encode()},
    {b"authorization": b"Basic " + GOOD.encode()},
    {b"x-api-key": b""},
    {b"x-api-key": OTHER.encode()},
    {b"x-api-key": b"Bearer " + GOOD.encode()},
]


async def test_every_route_wants_a_key(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokens([1]))
    routes = list(_every_route(create_app(CONFIG, engine, tokenizer)))
    assert ("POST", "/v1/chat/completions") in routes
    assert len(routes) > 10
    routes += [("GET", "/nowhere"), ("GET", "/health/live/"), ("GET", "//health/live"), ("PUT", "/metrics")]
    async with api(engine, tokenizer, CONFIG) as client:
        for method, path in routes:
            for headers in BAD:
                response = await client.request(method, path, headers=headers)
                if path == "/health/live":
                    assert response.status_code == 200
                    continue
                assert response.status_code == 401, (method, path, headers)
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.headers["x-request-id"]
                if method != "HEAD":
                    error = response.json()["error"]
                    if path.startswith("/v1/messages"):
                        assert error["type"] == "authentication_error"
                    else:
                        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
                        assert error["param"] is None
                    assert GOOD not in response.text
            for headers in (
                _bearer(GOOD),
                {b"x-api-key": GOOD.encode()},
                {b"authorization": b"bearer " + GOOD.encode()},
            ):
                response = await client.request(method, path, headers=headers)
                assert response.status_code != 401, (method, path)
    assert not engine.requests


async def test_without_keys_the_server_is_open(tokenizer: Tokenizer) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        assert (await client.get("/v1/models", headers=_bearer("anything"))).status_code == 200


async def test_nothing_of_the_body_is_read(tokenizer: Tokenizer) -> None:
    app = create_app(CONFIG, ScriptedEngine(tokens([1])), tokenizer)
    async with serving(app) as port:
        # The body never comes, and a length that is too long is not what is told.
        for length in (100, LIMIT + 1):
            status, headers, body = await exchange(port, post_head(f"Content-Length: {length}"))
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            assert headers["connection"] == "close"


@pytest.mark.parametrize("stream", [False, True])
async def test_keys_share_no_prefixes(tokenizer: Tokenizer, stream: bool) -> None:
    engine = ScriptedEngine(tokens([1]))
    both = ServerConfig(api_key=(api_key(GOOD, "ann"), api_key("sk-new", "ann"), api_key(OTHER, "bob")))
    async with api(engine, tokenizer, both) as client:
        for key in (GOOD, "sk-new", OTHER):
            for salt in (None, "s", "bob:s"):
                body = chat(stream=stream, cache_salt=salt)
                response = await client.post("/v1/chat/completions", json=body, headers=_bearer(key))
                assert response.status_code == 200
    salts = [request.cache_salt for request in engine.requests]
    assert salts[:3] == salts[3:6]  # one name, two keys
    assert len(set(salts)) == 6
    assert None not in salts
    assert [request.cache_owner for request in engine.requests] == ["ann"] * 6 + ["bob"] * 3


async def test_one_key_leaves_salts_alone(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokens([1]))
    async with api(engine, tokenizer, CONFIG) as client:
        for salt in (None, "s"):
            await client.post("/v1/chat/completions", json=chat(cache_salt=salt), headers=_bearer(GOOD))
    assert [request.cache_salt for request in engine.requests] == [None, "s"]


async def test_keys_show_up_nowhere(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ScriptedEngine(lambda request: [RuntimeError("a fault")])
    with caplog.at_level(logging.DEBUG):
        async with api(engine, tokenizer, CONFIG) as client:
            for key in (GOOD, OTHER):
                response = await client.post("/v1/chat/completions", json=chat(), headers=_bearer(key))
                assert response.status_code in (401, 500)
            page = (await client.get("/metrics", headers=_bearer(GOOD))).text
    for text in (caplog.text, page, repr(CONFIG), str(vars(ApiKeys(CONFIG.api_key)))):
        assert "sk-" not in text
        assert repr(CONFIG.api_key[0].digest) not in text
    assert cli.main(["serve", "--api-key", "sk-1 sk-2"]) == 2
    assert "sk-" not in capsys.readouterr().err


def _file(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_a_file_of_keys(tmp_path: Path) -> None:
    text = "# ours\n\nann: k1\nk2\r\n  bob:k3:with:colons  \n"
    assert read_api_keys(_file(tmp_path, text, 0o640)) == (
        api_key("k1", "ann"),
        api_key("k2"),
        api_key("k3:with:colons", "bob"),
    )


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        ("k1", 0o604, "can be read by every user"),
        ("# none\n", 0o600, "holds no key"),
        ("", 0o600, "holds no key"),
        ("k1\na b:secret", 0o600, "line 2: a name is"),
        ("ann:", 0o600, "line 1: a key is"),
        ("ann:two secrets", 0o600, "line 1: a key is"),
        ("ann:" + "secret" * 100, 0o600, "line 1: a key is"),
        ("k\n" * 2**20, 0o600, "is larger than"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, mode: int, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        read_api_keys(_file(tmp_path, text, mode))
    assert "secret" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        read_api_keys(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="cannot read"):
        read_api_keys(str(tmp_path))


@pytest.mark.parametrize("text", ["", ",", " , "])
def test_no_key_is_no_open_server(text: str) -> None:
    with pytest.raises(ValueError, match="at least one key"):
        parse_api_keys(text)
