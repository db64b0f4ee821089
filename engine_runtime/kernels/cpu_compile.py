"""How the CPU kernels are compiled, and where their machine code is kept between starts.

numba's cache notices a change of the file a kernel is in, but not of the files it imports: with an old cache,
a changed register tile would go unnoticed by the attention kernel around it, or crash it. So the code of one
state of this package's sources goes into one directory, named after their hash. It lies in
``$NUMBA_CACHE_DIR``, by default ``$XDG_CACHE_HOME/inflightd/numba``; where that cannot be written, or is not
ours alone, in a temporary directory, and each start compiles anew. A directory that no start has used for two
weeks is of sources that are gone, and is removed.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_PACKAGE = Path(__file__).parent.parent
_KEPT_S = 14 * 24 * 3600.0


def _sources_hash() -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def _default_base() -> Path:
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "inflightd" / "numba"


def _is_ours(directory: Path) -> bool:
    """Whether only we can write there: numba unpickles what it finds."""
    status = directory.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022 and os.access(directory, os.W_OK)


def _remove_unused(base: Path) -> None:
    oldest = time.time() - _KEPT_S
    for directory in base.iterdir():
        if re.fullmatch(r"[0-9a-f]{16}", directory.name) and directory.stat().st_mtime < oldest:
            shutil.rmtree(directory, ignore_errors=True)


def cache_directory(base: Path | None = None) -> Path:
    """Makes and returns the directory for the machine code of these sources, under ``base``."""
    try:
        if base is None:
            configured = os.environ.get("NUMBA_CACHE_DIR", "")
            base = Path(configured) if configured else _default_base()
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = base / _sources_hash()
        # No other process may look between our making the directory and our noting that it is in use.
        with (base / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            directory.mkdir(mode=0o700, exist_ok=True)
            if _is_ours(directory):
                os.utime(directory)
                _remove_unused(base)
                return directory
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        pass
    temporary = Path(tempfile.mkdtemp(prefix="inflightd-numba-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


numba.config.CACHE_DIR = str(cache_directory())


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a function with numba: no GIL, no bounds checks, IEEE arithmetic, code kept on disk."""
    return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
