"""The official OpenAI client for JavaScript against a real server process with the real default model.

The package is fetched once with npm into the user's cache. Without node, npm or a registry that
answers, the tests are skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from server.model_source import cache_directory
from tests.end_to_end.server_process import ServerProcess

MODEL = "smollm2-135m-instruct"
_PACKAGE = "openai@7.57.0"
_MIN_NODE = 20
_SCRIPT = Path(__file__).with_name("openai_client.cjs")


def _node_modules() -> Path:
    """Where the package lies, fetched if it does not yet. Skips the test if that fails."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: apt install nodejs npm; or from nodejs.org)")
    version = subprocess.check_output(["node", "--version"], text=True).strip()
    if int(version.lstrip("v").partition(".")[0]) < _MIN_NODE:
        pytest.skip(f"node is {version}, and {_PACKAGE} needs {_MIN_NODE} or newer")
    folder = cache_directory() / "node" / _PACKAGE
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            install = [
                "npm", "install", "--prefix", made, "--ignore-scripts", "--no-audit", "--no-fund",
                "--loglevel", "error", "--fetch-retries", "0", "--fetch-timeout", "20000", _PACKAGE,
            ]  # fmt: skip
            try:
                subprocess.run(install, check=True, capture_output=True, text=True, timeout=60)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"npm could not install {_PACKAGE}: {error.stderr.strip()[:300]}")
            except subprocess.TimeoutExpired:
                pytest.skip(f"npm could not install {_PACKAGE} in 60 s")
            with contextlib.suppress(OSError):  # somebody else was faster
                Path(made).rename(folder)
    return folder / "node_modules"


@pytest.fixture(scope="module")
def everything_seen(server: ServerProcess) -> dict[str, Any]:
    """What each part of the script saw."""
    environment = os.environ | {"NODE_PATH": str(_node_modules())}
    command = ["node", _SCRIPT, f"{server.url}/v1", MODEL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


@pytest.fixture
def seen(everything_seen: dict[str, Any], request: pytest.FixtureRequest) -> Any:
    """What the part saw that the test is named after."""
    part = everything_seen[request.node.name.removeprefix("test_")]
    if isinstance(part, dict) and "failed" in part:
        pytest.fail(part["failed"])
    return part


def test_models(seen: list[str]) -> None:
    assert seen == [MODEL]


def test_chat(seen: dict[str, Any]) -> None:
    assert "Paris" in seen["text"]
    assert seen["reason"] == "stop"
    assert seen["usage"]["completion_tokens"] > 3


def test_stream(seen: dict[str, Any], everything_seen: dict[str, Any]) -> None:
    whole = everything_seen["chat"]
    assert seen["text"] == whole["text"]
    assert seen["reason"] == whole["reason"]
    assert seen["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert seen["pieces"] > 3


def test_helper(seen: dict[str, str], everything_seen: dict[str, Any]) -> None:
    assert seen["text"] == seen["heard"] == everything_seen["chat"]["text"]


def test_tools(seen: list[dict[str, Any]]) -> None:
    for answer in seen:
        assert answer["reason"] == "tool_calls"
        assert not answer["content"]
        [call] = answer["calls"]
        assert call["id"].startswith("call_")
        assert call["name"] == "get_weather"
        assert call["given"].keys() == {"city", "days"}
        assert 1 <= call["given"]["days"] <= 9
    whole, streamed = (answer["calls"][0]["given"] for answer in seen)
    assert streamed == whole


def test_loop(seen: dict[str, list[str]]) -> None:
    [zone] = seen["called"]
    assert zone in ("UTC", "CET")
    assert seen["roles"] == ["user", "assistant", "tool"]


def test_parse(seen: dict[str, Any]) -> None:
    assert seen["city"] in ("Paris", "Rome")
    assert 1 <= seen["days"] <= 9


def test_responses(seen: dict[str, Any], everything_seen: dict[str, Any]) -> None:
    assert seen["status"] == "completed"
    assert seen["text"] == everything_seen["chat"]["text"]
    assert seen["kept"] == seen["streamed"] == seen["final"] == seen["text"]
    assert (seen["types"][0], seen["types"][-1]) == ("response.created", "response.completed")


def test_embeddings(seen: list[float]) -> None:
    assert seen == [pytest.approx(1.0, abs=1e-5)] * 2


def test_errors(seen: list[dict[str, Any]]) -> None:
    refused, unknown = seen
    assert refused["isRightClass"]
    assert (refused["status"], refused["type"]) == (400, "invalid_request_error")
    assert (refused["param"], refused["code"]) == ("temperature", "decimal_above_max_value")
    assert "temperature" in refused["message"]
    assert refused["requestID"]
    assert unknown["isRightClass"]
    assert (unknown["status"], unknown["code"]) == (404, "model_not_found")


def test_abort(seen: dict[str, Any], server: ServerProcess) -> None:
    assert seen["chunks"] >= 10
    assert seen["isAborted"]
    server.wait_until("num_requests_running", 0, seconds=1.0)
