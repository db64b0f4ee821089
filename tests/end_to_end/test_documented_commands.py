"""What README.md and docs/curl.md tell to type, run as it stands against a real server process.

Only the address is another one. Programs in Python run one after the other in one namespace, as readers would
paste them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.server_process import ServerProcess

_ROOT = Path(__file__).parents[2]
_ADDRESS = "http://127.0.0.1:8000"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(path: str, language: str) -> list[tuple[str, str]]:
    """(heading, text) of the code blocks of a page that speak to the server."""
    page = (_ROOT / path).read_text()
    blocks = []
    for section in re.split(r"^(?=#+ )", page, flags=re.MULTILINE):
        heading = section.partition("\n")[0].lstrip("# ")
        blocks += [(heading, text) for kind, text in _BLOCK.findall(section) if kind == language]
    return blocks


def _chat(output: str) -> dict[str, Any]:
    answer = json.loads(output)
    assert answer["object"] == "chat.completion"
    choice: dict[str, Any] = answer["choices"][0]
    return choice


def _says_paris(output: str) -> None:
    assert "Paris" in _chat(output)["message"]["content"]


def _is_a_stream(output: str) -> None:
    *data, done = [line.removeprefix("data: ") for line in output.splitlines() if line]
    assert done == "[DONE]"
    chunks = [json.loads(line) for line in data]
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    assert "Paris" in text


def _is_a_stream_with_usage(output: str) -> None:
    _is_a_stream(output)
    assert json.loads(output.split("data: ")[-2])["usage"]["completion_tokens"] > 3


def _calls_the_tool(output: str) -> None:
    choice = _chat(output)
    assert choice["finish_reason"] == "tool_calls"
    for call in choice["message"]["tool_calls"]:
        assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")


def _has_the_form(output: str) -> None:
    assert json.loads(_chat(output)["message"]["content"])["answer"] in ("yes", "no")


def _is_an_error(output: str) -> None:
    error = json.loads(output)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == "temperature"


def _is_a_text(output: str) -> None:
    assert "Paris" in json.loads(output)["choices"][0]["text"]


def _goes_on(output: str) -> None:
    response = json.loads(output)
    assert response["object"] == "response"
    assert response["previous_response_id"].startswith("resp_")
    assert response["usage"]["input_tokens"] > 40  # the first question is among them


def _is_anthropics(output: str) -> None:
    message = json.loads(output)
    assert (message["type"], message["content"][0]["type"]) == ("message", "text")


def _is_tgis(output: str) -> None:
    assert "Paris" in json.loads(output)["generated_text"]


def _is_a_vector(output: str) -> None:
    [vector] = json.loads(output)["data"]
    assert sum(x * x for x in vector["embedding"]) == pytest.approx(1.0, abs=1e-4)
    assert len(vector["embedding"]) == 8


def _are_tokens(output: str) -> None:
    answer = json.loads(output)
    assert answer["count"] == len(answer["tokens"]) == 5


def _is_the_server(output: str) -> None:
    assert "smollm2-135m-instruct" in output
    assert "inflightd:num_requests_running" in output


_CHECKS: dict[str, tuple[int, Callable[[str], None]]] = {
    "Use it": (0, _is_a_stream),
    "A chat": (0, _says_paris),
    "A stream": (0, _is_a_stream_with_usage),
    "A tool": (0, _calls_the_tool),
    "An answer in a form": (0, _has_the_form),
    "An error": (22, _is_an_error),
    "A text": (0, _is_a_text),
    "A kept response, and one that goes on from it": (0, _goes_on),
    "In Anthropic's form": (0, _is_anthropics),
    "In TGI's form": (0, _is_tgis),
    "Embeddings": (0, _is_a_vector),
    "Tokens": (0, _are_tokens),
    "The server itself": (0, _is_the_server),
}
_COMMANDS = [
    (heading, text)
    for path in ("README.md", "docs/curl.md")
    for heading, text in _blocks(path, "sh")
    if "curl " in text
]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed (Debian: apt install curl)")
@pytest.mark.parametrize(("heading", "text"), _COMMANDS, ids=[heading for heading, _ in _COMMANDS])
def test_commands(heading: str, text: str, server: ServerProcess, tmp_path: Path) -> None:
    assert _ADDRESS in text
    # What a terminal does not need: without these a failure would hang or say nothing.
    (tmp_path / ".curlrc").write_text("silent\nshow-error\nmax-time = 60\n")
    done = subprocess.run(
        ["sh", "-c", text.replace(_ADDRESS, server.url)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"CURL_HOME": str(tmp_path)},
        check=False,
    )
    status, check = _CHECKS[heading]
    assert done.returncode == status, done.stderr
    check(done.stdout)


def test_every_check_has_its_command() -> None:
    assert {heading for heading, _ in _COMMANDS} == _CHECKS.keys()


@pytest.mark.filterwarnings("default::ResourceWarning")  # the clients are left open, as programs do
def test_python(server: ServerProcess) -> None:
    namespace: dict[str, Any] = {}
    outputs = []
    for _, text in _blocks("README.md", "python"):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(text.replace(_ADDRESS, server.url), namespace)
        outputs.append(output.getvalue())
    namespace["client"].close()
    haiku, arguments, city = outputs
    assert len(haiku) > 20
    assert isinstance(json.loads(arguments)["city"], str)
    assert re.fullmatch(r"name=.* country=.*\n", city, re.DOTALL)
