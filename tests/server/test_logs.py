"""What is written to the log, and what never is."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from server.logs import JsonFormatter, TextFormatter
from server.tokenizer import Tokenizer
from tests.server.http_client import api, chat
from tests.server.in_process_engine import ScriptedEngine, tokens


def _record(message: str, *arguments: object, **fields: object) -> logging.LogRecord:
    record = logging.LogRecord("server.x", logging.WARNING, "f.py", 1, message, arguments, None)
    record.created = 1.25
    if fields:
        record.fields = fields
    return record


def test_a_json_line() -> None:
    line = JsonFormatter().format(_record("a %s\n\x1b[31m", "b\r\n\ud800", finish_reason="stop", ttft=None))
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:01.250Z",
        "level": "warning",
        "logger": "server.x",
        "message": "a b\r\n\ud800\n\x1b[31m",
        "finish_reason": "stop",
        "ttft": None,
    }


def test_a_text_line_is_one_line() -> None:
    line = TextFormatter().format(_record("a\nfake line \x1b[31m", path="/\r\n", none=None))
    assert line.isprintable()
    assert line.endswith("WARNING server.x: a\\nfake line \\x1b[31m path=/\\r\\n")


def test_tracebacks_are_kept() -> None:
    try:
        raise RuntimeError("why")
    except RuntimeError:
        record = _record("failed")
        record.exc_info = sys.exc_info()
    assert "RuntimeError: why" in json.loads(JsonFormatter().format(record))["exception"]
    assert "RuntimeError: why" in TextFormatter().format(record)


@pytest.mark.parametrize("stream", [False, True])
async def test_one_line_a_request_without_what_was_said(
    tokenizer: Tokenizer, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with api(ScriptedEngine(tokens([28], [28, 28])), tokenizer) as client:
            body = chat("my secret is xyzzy", stream=stream, user="someone", stop=["plugh"])
            response = await client.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine"})
            assert response.status_code == 200
    (record,) = [record for record in caplog.records if record.name == "server.request"]
    line = json.loads(JsonFormatter().format(record))
    assert line["x_request_id"] == "mine"
    assert (line["finish_reason"], line["generated_tokens"]) == ("length", 3)
    assert line["prompt_tokens"] > 5
    assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["total_seconds"] < 10
    everything = "".join(JsonFormatter().format(record) for record in caplog.records)
    for word in ("xyzzy", "someone", "plugh", "sk-"):
        assert word not in everything
