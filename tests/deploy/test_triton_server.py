"""A real Triton (PyPI's nvidia-pytriton carries one) with the model repository, the real engine and model.

Where it is not installed, or has no stub for this Python, these are skipped. That Triton (2.51) has a stub
that crashes with NumPy 2, and knows the system's Python only: so it takes Debian's NumPy.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
_REPOSITORY = ROOT / "deploy/triton_server/model_repository"
_ARGUMENTS = "--threads 1 --kv-cache-bytes 128MiB --max-model-len 1024 --max-num-seqs 8 --log-level warning"


def _triton() -> Path | None:
    package = importlib.util.find_spec("pytriton")
    if package is None or package.origin is None:
        return None
    folder = Path(package.origin).with_name("tritonserver")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    has_stub = (folder / "python_backend_stubs" / version / "triton_python_backend_stub").exists()
    return folder if has_stub else None


TRITON = _triton()
pytestmark = pytest.mark.skipif(
    TRITON is None, reason="no Triton for this Python: pip install nvidia-pytriton"
)


class Triton:
    """The server, in a folder with copies of the repository and of the Python backend."""

    def __init__(self, folder: Path) -> None:
        assert TRITON is not None
        stub = TRITON / "python_backend_stubs" / f"3.{sys.version_info.minor}" / "triton_python_backend_stub"
        backend = folder / "backends/python"
        shutil.copytree(TRITON / "backends/python", backend)
        shutil.copy(stub, backend)
        (backend / stub.name).chmod(0o755)
        # Copies look for their libraries where the originals are.
        libraries = TRITON.parents[1] / "nvidia_pytriton.libs"
        models = folder / "models"
        shutil.copytree(_REPOSITORY, models, ignore=shutil.ignore_patterns("__pycache__"))
        config = models / "inflightd/config.pbtxt"
        text = config.read_text()
        assert text.count('string_value: ""') == 1
        config.write_text(text.replace('string_value: ""', f'string_value: "{_ARGUMENTS}"'))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [
                TRITON / "bin/tritonserver", f"--model-repository={models}",
                f"--backend-directory={folder / 'backends'}", "--http-address=127.0.0.1",
                f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false",
                "--exit-timeout-secs=20",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {
                "PYTHONPATH": str(ROOT),
                "INFLIGHTD_PYTHON": sys.executable,
                "LD_LIBRARY_PATH": str(libraries),
            },
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(line.rstrip("\n") for line in self.process.stdout)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 90
        while not self._is_ready():
            log = "\n".join(self.lines[-40:])
            assert self.process.poll() is None, log
            assert time.monotonic() < deadline, log
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/v2/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def engine_ids(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            pid = int(path.parent.name)
            try:
                if b"server.launch" in path.read_bytes() and self.process.pid in _ancestors(pid):
                    found.append(pid)
            except OSError:
                continue  # it has just ended
        return found

    def stop(self) -> int:
        self.process.terminate()
        try:
            status = self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


def _ancestors(pid: int) -> set[int]:
    found: set[int] = set()
    while pid > 1:
        found.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


@pytest.fixture(scope="module")
def triton(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    server = Triton(tmp_path_factory.mktemp("triton"))
    try:
        server.wait_until_ready()
        yield server
        engines = server.engine_ids()
        assert len(engines) == 1
        assert server.stop() == 0, "\n".join(server.lines[-40:])
        assert not Path(f"/proc/{engines[0]}").exists(), "the engine is gone with it"
    finally:
        if server.process.poll() is None:
            server.stop()


def _generate(triton: Triton, **inputs: Any) -> httpx.Response:
    return httpx.post(f"{triton.url}/v2/models/inflightd/generate", json=inputs, timeout=60)


def _stream(triton: Triton, **inputs: Any) -> list[dict[str, Any]]:
    url = f"{triton.url}/v2/models/inflightd/generate_stream"
    response = httpx.post(url, json={"stream": True, **inputs}, timeout=60)
    assert response.status_code == 200, response.text
    return [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line]


def test_a_text_comes_in_pieces_that_make_the_whole(triton: Triton) -> None:
    fields = {"text_input": "Once upon a time", "max_tokens": 20, "temperature": 0.0}
    whole = _generate(triton, **fields).json()
    pieces = _stream(triton, **fields)
    assert whole["finish_reason"] == "length"
    assert whole["num_output_tokens"] == 20
    assert whole["num_input_tokens"] == 4
    assert len(pieces) > 10
    assert "".join(piece["text_output"] for piece in pieces) == whole["text_output"] != ""
    assert [piece["finish_reason"] for piece in pieces] == [""] * (len(pieces) - 1) + ["length"]


def test_chats_and_parameters_are_those_of_the_http_api(triton: Triton) -> None:
    messages = json.dumps([{"role": "user", "content": "Answer with a number."}])
    sampling = json.dumps({"guided_regex": "[0-9]{3}", "seed": 4})
    answer = _generate(triton, messages=messages, sampling_parameters=sampling).json()
    assert answer["text_output"].isdigit()
    assert answer["finish_reason"] == "stop"
    again = [
        _generate(triton, text_input="A", max_tokens=8, temperature=1.0, seed=7).json()["text_output"]
        for _ in "ab"
    ]
    assert again[0] == again[1]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text_input": "a", "temperature": 9.0}, "temperature"),
        ({"text_input": "a", "sampling_parameters": "{"}, "not valid JSON"),
        ({"text_input": "a", "sampling_parameters": '{"n": 2}'}, "'n' is not supported here"),
        ({"text_input": "a", "messages": "[]"}, "either 'text_input' or 'messages'"),
        ({}, "either 'text_input' or 'messages'"),
        ({"text_input": "a " * 3000}, "context"),
    ],
    ids=["range", "json", "choices", "both", "neither", "long"],
)
def test_what_is_wrong_is_said(triton: Triton, inputs: dict[str, Any], message: str) -> None:
    response = _generate(triton, max_tokens=4, **inputs)
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]


def test_a_client_that_goes_frees_its_place(triton: Triton) -> None:
    """More of them than there are places, each for longer than the last answer may take."""
    url = f"{triton.url}/v2/models/inflightd/generate_stream"
    body = {
        "text_input": "Once",
        "max_tokens": 900,
        "stream": True,
        "sampling_parameters": '{"ignore_eos": true}',
    }
    for _ in range(24):
        with httpx.stream("POST", url, json=body, timeout=60) as response:
            next(response.iter_raw())
    began = time.monotonic()
    assert _generate(triton, text_input="Once", max_tokens=4).json()["num_output_tokens"] == 4
    assert time.monotonic() - began < 10
