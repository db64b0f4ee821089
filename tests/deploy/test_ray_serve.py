"""What replicas behind Ray Serve do, without Ray: which one answers, and streams that outlive one."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest

from deploy.ray_serve.marked_stream import MarkedStream
from deploy.ray_serve.messages import ProxiedRequest, ReplicaLost, ResponseHead, end_to_end
from deploy.ray_serve.prefix_routing import preference, prefix_of
from deploy.ray_serve.relay import Answer, Relay
from server.errors import EngineDeadError

_BODY = b'{"stream": true, "prompt": "a"} '


def _chat(*contents: str, **fields: Any) -> bytes:
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return json.dumps({"model": "m", "messages": messages, **fields}).encode()


def test_all_turns_of_a_conversation_have_one_prefix() -> None:
    first = prefix_of(_chat("Be brief.", "Hi"), 1024)
    assert first is not None
    assert prefix_of(_chat("Be brief.", "Hi", "Hello!", "Go on"), 1024) == first
    assert prefix_of(_chat("Be brief.", "Hi", temperature=1.0), 1024) == first
    assert prefix_of(_chat("Be brief.", "Hello"), 1024) != first
    assert prefix_of(_chat("Be brief.", "Hi", cache_salt="s"), 1024) != first
    parts = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
    ]
    assert prefix_of(json.dumps({"messages": parts}).encode(), 1024) != first


def test_a_long_system_prompt_decides_alone() -> None:
    system = "You answer for a shop. " * 100
    assert prefix_of(_chat(system, "Hi"), 1024) == prefix_of(_chat(system, "Where is my parcel?"), 1024)
    assert prefix_of(_chat(system, "Hi"), 10_000) != prefix_of(_chat(system, "Where?"), 10_000)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"{}", b'{"prompt": null}', b'{"prompt": ""}', b"[" * 100_000, b'{"input": 5.5}'],
    ids=lambda body: body[:20].decode(),
)
def test_a_body_without_a_prompt_has_no_prefix(body: bytes) -> None:
    assert prefix_of(body, 100) is None


def test_prompts_of_every_api_have_prefixes() -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": "text"}, {"prompt": [1, 2, 3]}, {"prompt": ["text", "b"]}, {"inputs": "text2"},
        {"input": "text3", "instructions": "i"},
        {"system": "s", "messages": [{"role": "user", "content": "u"}]},
    ]  # fmt: skip
    prefixes = [prefix_of(json.dumps(body).encode(), 100) for body in bodies]
    assert None not in prefixes
    assert len(set(prefixes)) == len(prefixes)


def test_a_prefix_keeps_its_replica_and_moves_only_with_it() -> None:
    idle = dict.fromkeys("abcde", 0)
    prefixes = [f"prefix {i}".encode() for i in range(2000)]
    first = {prefix: preference(prefix, idle)[0] for prefix in prefixes}
    assert all(300 < count < 500 for count in Counter(first.values()).values())
    without = {name: 0 for name in idle if name != "c"}
    for prefix, replica in first.items():
        moved = preference(prefix, without)[0]
        assert moved == replica or replica == "c"
    assert first[prefixes[0]] == preference(prefixes[0], dict(reversed(idle.items())))[0]


def test_no_replica_gets_more_than_its_bound() -> None:
    loads = dict.fromkeys("abcd", 0)
    for count in range(1, 401):
        replica = preference(b"everybody's system prompt", loads, slack=1.25, free_load=8)[0]
        loads[replica] += 1
        assert max(loads.values()) <= max(8, 1.25 * count / 4 + 1)
    assert max(loads.values()) == 125


def test_below_the_free_load_a_prefix_does_not_move() -> None:
    home = preference(b"p", {"a": 0, "b": 0})[0]
    assert preference(b"p", {"a": 0, "b": 0} | {home: 7}, free_load=8)[0] == home
    assert preference(b"p", {"a": 0, "b": 0} | {home: 8}, free_load=8)[0] != home


def test_without_a_prefix_the_least_loaded_and_avoided_ones_last() -> None:
    assert preference(None, {"a": 3, "b": 1, "c": 2}) == ["b", "c", "a"]
    home, *_ = preference(b"p", dict.fromkeys("abc", 0))
    assert preference(b"p", dict.fromkeys("abc", 0), avoided=[home])[-1] == home
    assert preference(b"p", {"a": 0}, avoided=["a"]) == ["a"]
    assert preference(b"p", {}) == []


def _mark(*token_ids: int, **fields: Any) -> bytes:
    return b": resume " + json.dumps({**fields, "token_ids": token_ids}).encode() + b"\n\n"


_STREAM = [
    b'data: {"n":1}\n\n', _mark(5, id="c-1", created=3, seed=9), b": keep-alive\n\n",
    b'data: {"n":2}\n\ndata: {"n":3}\n\n', _mark(6, 7), b'data: {"n":4}\n\n', b"data: [DONE]\n\n",
]  # fmt: skip
_VISIBLE = b"".join(part for part in _STREAM if not part.startswith(b": resume"))


def test_however_a_stream_is_cut_only_marks_are_taken_out() -> None:
    rng = random.Random(1)
    data = b"".join(_STREAM)
    for _ in range(200):
        cuts = sorted(rng.sample(range(len(data)), rng.randrange(0, 12)))
        stream = MarkedStream()
        pieces = [stream.feed(data[a:b]) for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        assert b"".join(pieces) + stream.finish() == _VISIBLE


def test_what_stands_before_a_mark_is_passed_on_and_nothing_behind_it() -> None:
    stream = MarkedStream()
    assert stream.feed(_STREAM[0]) == b""
    assert stream.resumed_body(_BODY) == _BODY  # nothing was passed on: once more from the beginning
    assert stream.feed(_STREAM[0] + _STREAM[1]) == _STREAM[0]
    assert stream.feed(_STREAM[2]) == _STREAM[2], "a comment on silence is not held back"
    assert stream.feed(_STREAM[3]) == b""
    body = json.loads(stream.resumed_body(_BODY))
    assert body["resume"] == {"id": "c-1", "created": 3, "seed": 9, "token_ids": [5]}
    assert stream.feed(_STREAM[3] + _mark(6, 7, id="c-1", created=3, seed=9)) == _STREAM[3]
    assert json.loads(stream.resumed_body(_BODY))["resume"]["token_ids"] == [5, 6, 7]


def test_headers_of_the_connection_stay_behind() -> None:
    headers = (
        (b"Connection", b"close, X-Hop"),
        (b"x-hop", b"1"),
        (b"Host", b"h"),
        (b"Accept", b"*/*"),
        (b"TE", b"t"),
    )
    assert end_to_end(headers) == ((b"accept", b"*/*"),)


_SSE = ((b"content-type", b"text/event-stream; charset=utf-8"),)
_OK = ResponseHead(200, (*_SSE, (b"x-inflightd-resumable", b"true")), "one")
_ERROR = b'data: {"error":{"message":"m","type":"server_error","param":null,"code":"shutting_down"}}\n\n'
Script = list[ResponseHead | bytes | ReplicaLost]


async def _relayed(
    *scripts: Script, path: str = "/v1/completions", **fields: Any
) -> tuple[Any, bytes, list[ProxiedRequest]]:
    """The head and the bytes that the client gets, and what the replicas were asked."""
    asked: list[ProxiedRequest] = []

    async def ask(request: ProxiedRequest) -> Answer:
        asked.append(request)
        for item in scripts[len(asked) - 1]:
            yield item

    head, data = None, b""
    request = ProxiedRequest(**{"method": "POST", "target": b"/", "headers": (), "body": _BODY, **fields})
    async for item in Relay(ask, request, path).items():
        if isinstance(item, ResponseHead):
            assert head is None
            head = item
        else:
            data += item
    return head, data, asked


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.ray_serve.relay._FIRST_PAUSE_S", 0.0)


async def test_a_stream_is_passed_on_without_its_marks() -> None:
    head, data, (asked,) = await _relayed([_OK, *_STREAM])
    assert data == _VISIBLE
    assert head.headers == _SSE
    assert asked.headers == ((b"x-inflightd-resumable", b"true"),)


@pytest.mark.parametrize("end", [ReplicaLost("one"), _ERROR], ids=["lost", "shutting down"])
@pytest.mark.parametrize("num_parts", range(1, len(_STREAM)))
async def test_a_stream_goes_on_at_another_replica(end: ReplicaLost | bytes, num_parts: int) -> None:
    """The second replica says everything behind the last mark that the first one has sent."""
    num_marked = max((i + 1 for i in (1, 4) if i < num_parts), default=0)
    again = _STREAM[num_marked:] if num_marked != 2 else _STREAM[3:]
    before = [part for part in _STREAM[:num_parts] if num_marked or not part.startswith(b": keep")]
    head, data, asked = await _relayed([_OK, *before, end], [ResponseHead(200, _OK.headers, "two"), *again])
    keep_alive = b": keep-alive\n\n"
    assert data.replace(keep_alive, b"") == _VISIBLE.replace(keep_alive, b"")
    assert head.replica_id == "one"
    tokens = json.loads(asked[1].body).get("resume", {}).get("token_ids")
    assert tokens == {0: None, 2: [5], 5: [5, 6, 7]}[num_marked]
    if isinstance(end, ReplicaLost):
        assert asked[1].avoided == {"one"}


async def test_the_rest_of_a_stream_is_not_what_an_idempotency_key_stands_for() -> None:
    key = (b"idempotency-key", b"k")
    _, _, asked = await _relayed([_OK, *_STREAM[:2], ReplicaLost("one")], [_OK, *_STREAM[3:]], headers=(key,))
    assert [key in request.headers for request in asked] == [True, False]


async def test_what_is_lost_before_it_begins_is_asked_again() -> None:
    busy = ResponseHead(503, (), "two")
    head, data, asked = await _relayed(
        [ReplicaLost("")], [busy, b"{}"], [ResponseHead(200, (), "three"), b"{}"]
    )
    assert (head.replica_id, data) == ("three", b"{}")
    assert asked[-1].avoided == {"", "two"}
    assert {request.body for request in asked} == {_BODY}


async def test_a_replica_that_stays_busy_is_believed() -> None:
    busy: Script = [ResponseHead(503, (), "one"), b"busy"]
    head, data, asked = await _relayed(*[busy] * 6)
    assert (head.status, data, len(asked)) == (503, b"busy", 6)


async def test_errors_of_the_request_are_passed_on() -> None:
    for status in (400, 401, 429):
        head, data, asked = await _relayed([ResponseHead(status, (), "one"), b"why"])
        assert (head.status, data, len(asked)) == (status, b"why", 1)


async def test_a_stream_without_marks_ends_with_an_error_event() -> None:
    _, data, asked = await _relayed([ResponseHead(200, _SSE, "one"), b"data: 1\n\n", ReplicaLost("one")])
    assert data.startswith(b'data: 1\n\ndata: {"error":')
    assert len(asked) == 1
    _, data, _ = await _relayed(
        [ResponseHead(200, _SSE, "one"), b"data: 1\n\n", ReplicaLost("one")], path="/v1/messages"
    )
    assert data.startswith(b"data: 1\n\nevent: error\n")


async def test_a_stream_that_nobody_goes_on_with_ends_with_an_error_event() -> None:
    refused: Script = [ResponseHead(400, (), "two"), b"no"]
    _, data, asked = await _relayed([_OK, *_STREAM[:2], ReplicaLost("one")], refused)
    assert data.startswith(_STREAM[0] + b'data: {"error":')
    _, data, asked = await _relayed([_OK, *_STREAM[:2], ReplicaLost("one")], *[[ReplicaLost("")]] * 5)
    assert data.startswith(_STREAM[0] + b'data: {"error":')
    assert len(asked) == 6


async def test_a_response_that_is_no_stream_breaks_off() -> None:
    with pytest.raises(EngineDeadError):
        await _relayed([ResponseHead(200, (), "one"), b'{"half', ReplicaLost("one")])
    with pytest.raises(EngineDeadError):
        await _relayed(*[[ReplicaLost("one")]] * 6)


async def test_a_client_that_reads_marks_gets_them() -> None:
    _, data, _ = await _relayed([_OK, *_STREAM], headers=((b"x-inflightd-resumable", b"true"),))
    assert data == b"".join(_STREAM)


async def test_a_client_that_goes_ends_the_request_at_the_replica() -> None:
    closed: list[str] = []

    async def ask(request: ProxiedRequest) -> Answer:
        try:
            yield _OK
            for part in _STREAM:
                yield part
        finally:
            closed.append("at the replica")

    items = Relay(ask, ProxiedRequest("POST", b"/", (), _BODY), "/").items()
    assert isinstance(await anext(items), ResponseHead)
    await anext(items)
    await items.aclose()
    assert closed == ["at the replica"]
