"""``inflightd chat``: a conversation with a running server, streamed into the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import httpx

_HELP = "Type a message and press Enter. /reset starts over, /exit or ^D ends."
_TIMEOUT = httpx.Timeout(10.0, read=300.0)


class ChatError(Exception):
    """The server cannot be reached or refuses; the message says what to do."""


def run_chat(
    url: str,
    model: str | None,
    system: str | None,
    temperature: float | None,
    max_tokens: int | None,
    *,
    api_key: str | None = None,
    source: TextIO = sys.stdin,
    sink: TextIO = sys.stdout,
) -> int:
    """Reads messages from ``source`` until its end, writes answers to ``sink``; returns the exit status."""
    settings: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
    settings = {name: value for name, value in settings.items() if value is not None}
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    is_interactive = source.isatty()
    # As bytes: what is no header is then refused when it is sent, like every other fault of the connection.
    headers = {b"authorization": b"Bearer " + api_key.encode()} if api_key else {}
    with httpx.Client(base_url=url.rstrip("/"), timeout=_TIMEOUT, headers=headers) as client:
        try:
            settings["model"] = model or _first_model(client)
        except ChatError as error:
            print(f"inflightd chat: {error}", file=sys.stderr)  # noqa: T201
            return 1
        if is_interactive:
            sink.write(f"{settings['model']} at {url}. {_HELP}\n")
        while True:
            if is_interactive:
                sink.write("\n> ")
                sink.flush()
            line = source.readline()
            text = line.strip()
            if not line or text == "/exit":
                return 0
            if text == "/reset":
                messages = list(opening)
            elif text:
                messages.append({"role": "user", "content": text})
                answer = []
                try:
                    for piece in _stream(client, {"messages": messages, "stream": True, **settings}):
                        answer.append(piece)
                        sink.write(piece)
                        sink.flush()
                except ChatError as error:
                    messages.pop()
                    print(f"\ninflightd chat: {error}", file=sys.stderr)  # noqa: T201
                    if not is_interactive:
                        return 1
                    continue
                except KeyboardInterrupt:
                    if not is_interactive:
                        raise
                    sink.write(" [stopped]")
                messages.append({"role": "assistant", "content": "".join(answer)})
                sink.write("\n")


def _first_model(client: httpx.Client) -> str:
    try:
        response = client.get("/v1/models")
        if response.status_code == 401:
            raise ChatError("the server wants another key: --api-key or INFLIGHTD_API_KEY.")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise ChatError(
            f"no server answers at {client.base_url} ({error}). Start one with 'inflightd serve', or name "
            "another with --url."
        ) from None


def _stream(client: httpx.Client, body: dict[str, Any]) -> Iterator[str]:
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise ChatError(_message(response.json()))
            is_complete = False
            for line in response.iter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    is_complete = True
                    continue
                event = json.loads(line[len("data: ") :])
                if "error" in event:
                    raise ChatError(_message(event))
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""
            if not is_complete:
                raise ChatError("the answer broke off")
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        raise ChatError(f"the connection failed: {error}") from None


def _message(body: Any) -> str:
    try:
        return str(body["error"]["message"])
    except (TypeError, KeyError):
        return "the server answered with something that is no OpenAI error"
