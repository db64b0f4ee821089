"""Responses that are kept: conversations, their items, whose they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from server.api_keys import api_key
from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.server.http_client import MODEL, api
from tests.server.in_process_engine import scripted_text
from tests.server.responses_client import TEXT, responses_client


async def test_a_conversation(tokenizer: Tokenizer) -> None:
    engine = scripted_text(tokenizer, TEXT)
    async with responses_client(engine, tokenizer) as client:
        first = await client.responses.create(model=MODEL, input="A", instructions="Only now.")
        second = await client.responses.create(
            model=MODEL, input=[{"role": "user", "content": "B"}], previous_response_id=first.id
        )
        third = await client.responses.create(
            model=MODEL, input="C", previous_response_id=second.id, store=False
        )
        counted = await client.responses.input_tokens.count(
            model=MODEL, input="C", previous_response_id=second.id
        )
        items = await client.responses.input_items.list(second.id, order="asc")
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(third.id)
        await client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError) as deleted:
            await client.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError) as missing:
            await client.responses.create(model=MODEL, input="D", previous_response_id=first.id)
        # What the second answers does not go with the first.
        again = await client.responses.create(model=MODEL, input="C", previous_response_id=second.id)
    texts = ["A", TEXT, "B", TEXT, "C"]
    chat = [{"role": "assistant" if t == TEXT else "user", "content": t} for t in texts]
    assert list(engine.requests[2].prompt_token_ids) == tokenizer.encode_chat(chat)
    assert engine.requests[-1].prompt_token_ids == engine.requests[2].prompt_token_ids
    assert again.previous_response_id == second.id
    assert counted.input_tokens == len(tokenizer.encode_chat(chat))
    assert [(item.role, item.content[0].text) for item in items.data] == [  # type: ignore[union-attr]
        ("user", "A"),
        ("assistant", TEXT),
        ("user", "B"),
    ]
    assert deleted.value.code == "response_not_found"
    assert (missing.value.code, missing.value.param) == (
        "previous_response_not_found",
        "previous_response_id",
    )


async def test_items_that_are_only_named(tokenizer: Tokenizer) -> None:
    """As the AI SDK sends what the server has said itself."""
    engine = scripted_text(tokenizer, TEXT)
    async with responses_client(engine, tokenizer) as client:
        first = await client.responses.create(model=MODEL, input="A")
        async with client.responses.stream(model=MODEL, input="B") as stream:
            second = await stream.get_final_response()
        asked: Any = [
            {"role": "user", "content": "A"},
            {"type": "item_reference", "id": first.output[0].id},
            {"role": "user", "content": "B"},
            {"type": "item_reference", "id": second.output[0].id},
            {"role": "user", "content": "C"},
        ]
        third = await client.responses.create(model=MODEL, input=asked)
        items = await client.responses.input_items.list(third.id, order="asc")
        assert [item.type for item in items.data] == ["message"] * 5
        with pytest.raises(openai.BadRequestError) as twice:
            await client.responses.create(model=MODEL, input=[asked[1], asked[1]])
        await client.responses.delete(first.id)
        with pytest.raises(openai.BadRequestError) as gone:
            await client.responses.create(model=MODEL, input=asked)
        unknown: Any = [{"type": "item_reference", "id": f"{second.output[0].id}0"}]
        with pytest.raises(openai.BadRequestError) as other:
            await client.responses.create(model=MODEL, input=unknown)
    chat = [{"role": "assistant" if t == TEXT else "user", "content": t} for t in ("A", TEXT, "B", TEXT, "C")]
    assert list(engine.requests[2].prompt_token_ids) == tokenizer.encode_chat(chat)
    assert len(engine.requests) == 3
    assert (twice.value.code, twice.value.param) == ("invalid_value", "input[1].id")
    assert (gone.value.code, gone.value.param) == ("item_not_found", "input[1].id")
    assert other.value.code == "item_not_found"


async def test_pages_of_items(tokenizer: Tokenizer) -> None:
    async with api(scripted_text(tokenizer, TEXT), tokenizer) as client:
        items = [{"role": "user", "content": text, "id": f"msg_{text}"} for text in "ABCDE"]
        created = (await client.post("/v1/responses", json={"input": items})).json()
        path = f"/v1/responses/{created['id']}/input_items"

        async def page(query: str) -> tuple[str, bool]:
            shown = (await client.get(f"{path}?{query}")).json()
            ids = [item["id"] for item in shown["data"]]
            assert (shown["first_id"], shown["last_id"]) == (ids[0], ids[-1])
            return "".join(item["content"][0]["text"] for item in shown["data"]), shown["has_more"]

        assert await page("") == ("EDCBA", False)
        assert await page("limit=2") == ("ED", True)
        assert await page("limit=2&after=msg_D") == ("CB", True)
        assert await page("limit=3&after=msg_B&order=asc") == ("CDE", False)
        for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=msg_X"):
            response = await client.get(f"{path}?{query}")
            assert response.status_code == 400
            assert response.json()["error"]["param"] == query.partition("=")[0]
        cancelled = await client.post(f"/v1/responses/{created['id']}/cancel")
        assert cancelled.status_code == 400
        assert (await client.get(f"/v1/responses/{created['id']}?stream=true")).status_code == 400
        for method, path in (
            ("GET", "/v1/responses/x"),
            ("GET", "/v1/responses/x/input_items"),
            ("POST", "/v1/responses/x/cancel"),
            ("DELETE", "/v1/responses/x"),
        ):
            assert (await client.request(method, path)).status_code == 404


async def test_a_response_belongs_to_its_key(tokenizer: Tokenizer, tmp_path: Path) -> None:
    keys = (api_key("sk-a1", "ann"), api_key("sk-a2", "ann"), api_key("sk-b", "bob"))
    for path in (None, str(tmp_path / "responses.db")):
        config = ServerConfig(api_key=keys, responses_db=path)
        async with responses_client(scripted_text(tokenizer, TEXT), tokenizer, config, key="sk-a1") as client:
            mine = await client.responses.create(model=MODEL, input="Hi")
            assert (await client.with_options(api_key="sk-a2").responses.retrieve(mine.id)).id == mine.id
            other = client.with_options(api_key="sk-b").responses
            for attempt in (other.retrieve, other.delete, other.input_items.list, other.cancel):
                with pytest.raises(openai.NotFoundError):
                    await attempt(mine.id)
            with pytest.raises(openai.BadRequestError):
                await other.create(model=MODEL, input="Hi", previous_response_id=mine.id)
            assert (await client.responses.retrieve(mine.id)).id == mine.id
