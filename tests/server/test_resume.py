"""A stream goes on at another server behind any of its marks, as if nothing had happened."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from scheduler.hashing_executor import HashingExecutor
from scheduler.messages import EngineOutput, FinishReason
from server.tokenizer import Tokenizer
from tests.server.http_client import MODEL, api
from tests.server.in_process_engine import SPEC, HashingEngine, ScriptedEngine, tokens

_MARKED = {"x-inflightd-resumable": "true"}
_MARK = ": resume "
_PATHS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "One two three"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "One two"}]},
}


def _engine(tokenizer: Tokenizer, steps_at_once: int = 1) -> HashingEngine:
    executor = HashingExecutor(
        64, 4, vocab_size=tokenizer.vocab_size, max_num_batched_tokens=32, max_model_len=200
    )
    return HashingEngine(executor, steps_at_once)


def _body(path: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "stream": True, "max_tokens": 24, "ignore_eos": True, **_PATHS[path], **fields}


def _parts(text: str) -> tuple[list[str], list[dict[str, Any]]]:
    """What stands before each mark, and behind the last; and what the marks say."""
    parts, marks = [""], []
    for event in text.removesuffix("\n\n").split("\n\n"):
        if event.startswith(_MARK):
            marks.append(json.loads(event.removeprefix(_MARK)))
            parts.append("")
        else:
            parts[-1] += event + "\n\n"
    return parts, marks


def _resume(marks: list[dict[str, Any]]) -> dict[str, Any]:
    return marks[0] | {"token_ids": [token for mark in marks for token in mark["token_ids"]]}


def _said(events: str) -> tuple[str, list[int], Any, Any]:
    """Text, token ids, finish reason and usage; how tokens are split into chunks may differ."""
    text, token_ids, reason, usage = "", [], None, None
    for event in events.removesuffix("\n\n").split("\n\n"):
        if event == "data: [DONE]":
            continue
        chunk = json.loads(event.removeprefix("data: "))
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            token_ids += choice.get("token_ids") or []
            reason = choice["finish_reason"] or reason
    return text, token_ids, reason, usage


@pytest.mark.parametrize("path", list(_PATHS))
@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 5},
        {},  # the server draws the seed
        {"seed": 5, "stop": ["e", "qu"], "include_stop_str_in_output": True},
        {"seed": 7, "return_token_ids": True, "stream_options": {"include_usage": True}},
    ],
    ids=["seeded", "unseeded", "stop", "ids"],
)
async def test_behind_every_mark_another_server_says_the_rest(
    tokenizer: Tokenizer, path: str, fields: dict[str, Any]
) -> None:
    async with api(_engine(tokenizer), tokenizer) as client:
        response = await client.post(path, json=_body(path, **fields), headers=_MARKED)
    assert response.headers["x-inflightd-resumable"] == "true"
    parts, marks = _parts(response.text)
    whole = _said("".join(parts))
    assert parts[-1].endswith("data: [DONE]\n\n")
    assert '"finish_reason":"' in parts[-1], "the finish and the end are on the same side of every mark"
    identity = json.loads(parts[0].split("\n\n")[0].removeprefix("data: "))
    async with api(_engine(tokenizer, steps_at_once=3), tokenizer) as other:
        for num_marks in range(1, len(marks) + 1):
            body = _body(path, **fields, resume=_resume(marks[:num_marks]))
            rest = (await other.post(path, json=body)).text
            assert _MARK not in rest
            assert _said("".join(parts[:num_marks]) + rest) == whole, f"behind mark {num_marks}"
            first = json.loads(rest.split("\n\n")[0].removeprefix("data: "))
            assert (first["id"], first["created"]) == (identity["id"], identity["created"])


async def test_a_resumed_stream_can_be_resumed(tokenizer: Tokenizer) -> None:
    path = "/v1/completions"
    async with api(_engine(tokenizer), tokenizer) as client:
        parts, marks = _parts((await client.post(path, json=_body(path), headers=_MARKED)).text)
        body = _body(path, resume=_resume(marks[:4]))
        more, later = _parts((await client.post(path, json=body, headers=_MARKED)).text)
        assert _resume(marks[:4] + later[:3]) == _resume(marks[:7])
        body = _body(path, resume=_resume(marks[:4] + later[:3]))
        rest = (await client.post(path, json=body)).text
    assert "".join(parts[:4]) + "".join(more[:3]) + rest == "".join(parts)


@pytest.mark.parametrize(
    "fields", [{"n": 2}, {"logprobs": 1}, {"echo": True}, {"stream": False}], ids=lambda fields: str(*fields)
)
async def test_what_could_not_go_on_has_no_marks(tokenizer: Tokenizer, fields: dict[str, Any]) -> None:
    path = "/v1/completions"
    resume = {"id": "cmpl-1", "created": 1, "seed": 1, "token_ids": [5]}
    async with api(_engine(tokenizer), tokenizer) as client:
        response = await client.post(path, json=_body(path, **fields), headers=_MARKED)
        refused = await client.post(path, json=_body(path, **fields, resume=resume))
    assert response.status_code == 200
    assert "x-inflightd-resumable" not in response.headers
    assert _MARK not in response.text
    assert _error(refused) == ("resume", "invalid_value")


async def test_without_the_header_there_are_no_marks(tokenizer: Tokenizer) -> None:
    async with api(_engine(tokenizer), tokenizer) as client:
        response = await client.post("/v1/completions", json=_body("/v1/completions"))
    assert _MARK not in response.text
    assert "x-inflightd-resumable" not in response.headers


@pytest.mark.parametrize(
    ("token_ids", "fields", "code"),
    [
        ([], {}, "array_below_min_length"),
        ([49_152], {}, "integer_above_max_value"),
        ([5, 6], {"max_tokens": 2}, "array_above_max_length"),
        ([3], {"stop": ["<"], "skip_special_tokens": False}, "invalid_value"),
    ],
    ids=["none", "no token", "all", "stopped"],
)
async def test_tokens_behind_which_nothing_can_come(
    tokenizer: Tokenizer, token_ids: list[int], fields: dict[str, Any], code: str
) -> None:
    resume = {"id": "cmpl-1", "created": 1, "seed": 1, "token_ids": token_ids}
    async with api(_engine(tokenizer), tokenizer) as client:
        response = await client.post(
            "/v1/completions", json=_body("/v1/completions", **fields, resume=resume)
        )
    param, found = _error(response)
    assert found == code
    assert param.startswith("resume.token_ids")


async def test_tokens_that_break_the_grammar_are_the_requests_fault(tokenizer: Tokenizer) -> None:
    def failing(request: Any) -> list[EngineOutput]:
        return [EngineOutput(request.request_id, (), finish_reason=FinishReason.ERROR, error="no such text")]

    resume = {"id": "cmpl-1", "created": 1, "seed": 1, "token_ids": [5]}
    body = _body("/v1/completions", guided_regex="[0-9]+", resume=resume)
    async with api(ScriptedEngine(failing), tokenizer) as client:
        assert _error(await client.post("/v1/completions", json=body)) == (
            "resume.token_ids",
            "invalid_value",
        )


async def test_cached_tokens_are_those_that_the_client_was_first_told_of(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokens([7], [8], cached=16), SPEC)
    resume = {"id": "cmpl-1", "created": 1, "seed": 1, "cached_tokens": 2, "token_ids": [5, 6]}
    body = _body("/v1/completions", stream_options={"include_usage": True}, resume=resume)
    async with api(engine, tokenizer) as client:
        response = await client.post("/v1/completions", json=body)
    _, _, _, usage = _said(response.text)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 2
    assert usage["completion_tokens"] == 4
    assert engine.requests[0].generated_token_ids == (5, 6)


def _error(response: httpx.Response) -> tuple[str, str]:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["code"]
