"""The benchmark's client: what it reads from a stream, and its closed loop against a small real server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator

import pytest

from server.bench.load_report import report_of
from server.bench.stream_client import Exchange, ResponseError, Target, read_answer, run_load

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nKeep-Alive: timeout=5, max=100\r\n\r\n"


def _event(content: object, line_end: str) -> bytes:
    text = content if isinstance(content, str) else json.dumps(content)
    return f"data: {text}{line_end}{line_end}".encode()


def _events(line_end: str = "\n") -> list[bytes]:
    usage = {"prompt_tokens": 5, "completion_tokens": 3}
    return [
        _event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, line_end),
        _event({"choices": [{"delta": {"content": "é"}}]}, line_end),
        _event({"choices": [{"text": "b\n"}]}, line_end),
        _event({"choices": [{"text": "", "finish_reason": "length"}]}, line_end),
        _event({"choices": [], "usage": usage}, line_end),
        _event("[DONE]", line_end),
    ]


def _chunk(content: bytes) -> bytes:
    return f"{len(content):x}\r\n".encode() + content + b"\r\n"


def _stream(line_end: str = "\n") -> list[bytes]:
    return [HEAD, *map(_chunk, _events(line_end)), b"0\r\n\r\n"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_tokens_get_the_time_of_their_last_byte(line_end: str) -> None:
    parts = _stream(line_end)
    exchange = Exchange(0.5, [(float(number), part) for number, part in enumerate(parts)])
    answer = read_answer(exchange)
    assert answer.token_times == (2.0, 3.0)
    assert (answer.start, answer.text, answer.finish_reason) == (0.5, "éb\n", "length")
    assert (answer.num_prompt_tokens, answer.num_output_tokens) == (5, 3)


def test_any_split_of_the_bytes_reads_the_same() -> None:
    stream = b"".join(_stream())
    end_of_first_token = stream.index(b"}\n\n", stream.index(b"\\u00e9")) + 2
    for split in range(1, len(stream)):
        answer = read_answer(Exchange(0.0, [(1.0, stream[:split]), (2.0, stream[split:])]))
        assert answer.text == "éb\n"
        assert answer.token_times[0] == (1.0 if split > end_of_first_token else 2.0), split


@pytest.mark.parametrize("missing", ["[DONE]", "usage"])
def test_incomplete_streams_are_refused(missing: str) -> None:
    parts = [part for part in _stream() if missing.encode() not in part]
    with pytest.raises(ResponseError, match="incomplete"):
        read_answer(Exchange(0.0, [(0.0, b"".join(parts))]))


def _exchange(*events: object) -> Exchange:
    parts = [HEAD, *(_chunk(_event(event, "\n")) for event in events), b"0\r\n\r\n"]
    return Exchange(0.0, [(float(number), part) for number, part in enumerate(parts)])


USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thoughts_are_part_of_the_answer(field: str) -> None:
    thought, text = {"choices": [{"delta": {field: "hm"}}]}, {"choices": [{"delta": {"content": "a"}}]}
    answer = read_answer(_exchange(thought, text, USAGE, "[DONE]"))
    assert (answer.token_times, answer.text) == ((1.0, 2.0), "hma")


def test_an_answer_whose_tokens_show_no_text_comes_with_its_end() -> None:
    end = {"choices": [{"text": "", "finish_reason": "length"}]}
    answer = read_answer(_exchange({"choices": [{"text": ""}]}, end, USAGE, "[DONE]"))
    assert (answer.token_times, answer.text, answer.num_output_tokens) == ((2.0,), "", 2)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (("{cut",), "no stream of OpenAI"),
        ((["a list"],), "no stream of OpenAI"),
        (
            ({"choices": [{"text": "a"}], "usage": {"tokens": 3}}, "[DONE]"),
            "no stream of OpenAI.*prompt_tokens",
        ),
        (({"choices": None}, {"error": {"message": "out of memory"}}), "out of memory"),
    ],
)
def test_what_is_no_answer_is_one_failed_request_and_not_the_end(
    events: tuple[object, ...], message: str
) -> None:
    with pytest.raises(ResponseError, match=message):
        read_answer(_exchange(*events))


class _Server:
    """Answers each POST with the stream above, slowly, and counts how many it answers at once."""

    def __init__(self) -> None:
        self.running = 0
        self.most_at_once = 0
        self.bodies: list[bytes] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(reader, writer)
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        self.bodies.append(await reader.readexactly(length))
        if head.startswith(b"POST /fail "):
            writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 6\r\n\r\nbroken")
        elif head.startswith((b"POST /refuse ", b"POST /kept ")):
            error = json.dumps({"error": {"message": "There is\nno room.", "type": "x"}}).encode()
            fields = f"x-request-id: req_{len(self.bodies)}\r\nfiller: {'x' * 400}\r\n"
            if head.startswith(b"POST /kept "):  # and the connection stays open
                fields += f"content-length: {len(error)}\r\n"
            writer.write(f"HTTP/1.1 429 Too Many Requests\r\n{fields}\r\n".encode() + error[:9])
            await asyncio.sleep(0.01)
            writer.write(error[9:])
            if head.startswith(b"POST /kept "):
                await reader.read()
        elif head.startswith(b"POST /cut "):
            writer.write(HEAD + _chunk(_events()[0]))
        else:
            self.running += 1
            self.most_at_once = max(self.most_at_once, self.running)
            for part in _stream()[:-1]:
                writer.write(part)
                await asyncio.sleep(0.002)
            self.running -= 1
            writer.write(_stream()[-1])


async def _end(listener: asyncio.Server) -> None:
    """Whoever is still being answered is given up; no connection outlives the loop."""
    listener.close()
    answers = asyncio.all_tasks() - {asyncio.current_task()}
    for answer in answers:
        answer.cancel()
    await asyncio.gather(*answers, return_exceptions=True)
    await asyncio.sleep(0)  # connections are closed in the next round


@pytest.fixture
def server() -> Iterator[tuple[_Server, int]]:
    """The server above in a thread of its own, and its port."""
    state = _Server()
    loop = asyncio.new_event_loop()
    listener = loop.run_until_complete(asyncio.start_server(state.answer, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield state, listener.sockets[0].getsockname()[1]
    asyncio.run_coroutine_threadsafe(_end(listener), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_closed_loop(server: tuple[_Server, int]) -> None:
    state, port = server
    run = run_load(
        Target("127.0.0.1", port),
        "/v1/completions",
        [{"number": number} for number in range(12)],
        concurrency=4,
        seconds_for_one=10.0,
    )
    assert sorted(json.loads(body)["number"] for body in state.bodies) == list(range(12))
    assert state.most_at_once == 4
    assert [read_answer(exchange).num_output_tokens for exchange in run.exchanges] == [3] * 12
    assert run.client_cpu_seconds < run.seconds


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/fail", "HTTP/1.1 400 Bad Request: broken"),
        ("/cut", "closed before the last chunk"),
        ("/refuse", "HTTP/1.1 429 Too Many Requests: There is no room."),
        ("/kept", "HTTP/1.1 429 Too Many Requests: There is no room."),
    ],
)
def test_failures_are_told_and_alike_ones_counted_together(
    server: tuple[_Server, int], path: str, message: str
) -> None:
    run = run_load(Target("127.0.0.1", server[1]), path, [{}, {}], concurrency=1, seconds_for_one=10.0)
    assert report_of("2", run).failures == {message: 2}
