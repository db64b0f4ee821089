"""Pages of a file come and go; the numbers stay."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from engine_runtime.weights.mapped_pages import is_mapped, populate, release

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, asks Linux's madvise")
_BYTES = 8 << 20


def resident_bytes(path: Path) -> int:
    """Of the mapping of a file, as the kernel counts them."""
    text = Path("/proc/self/smaps").read_text()
    found = re.search(rf"{re.escape(str(path))}\n.*?\nRss:\s+(\d+) kB", text, re.S)
    assert found is not None
    return int(found[1]) << 10


def mapped_file(folder: Path) -> tuple[Path, np.memmap]:  # type: ignore[type-arg]
    path = folder / "weights"
    path.write_bytes(np.random.default_rng(0).bytes(_BYTES))
    return path, np.memmap(path, np.uint8, mode="r")


def test_released_pages_are_no_longer_ours_and_read_the_same_again(tmp_path: Path) -> None:
    path, data = mapped_file(tmp_path)
    view = data[40 : 40 + _BYTES // 2].view(np.float16)
    before = view.copy()
    if resident_bytes(path) == 0:
        pytest.skip("this kernel does not count a mapping's pages")
    release(view)
    assert resident_bytes(path) < _BYTES // 8
    np.testing.assert_array_equal(view.view(np.uint16), before.view(np.uint16))


def test_populated_pages_are_there(tmp_path: Path) -> None:
    path, data = mapped_file(tmp_path)
    release(data)
    populate(data)
    if resident_bytes(path) == 0:
        pytest.skip("this kernel populates no mappings (Linux 5.14 does)")
    assert resident_bytes(path) >= _BYTES


def test_only_views_of_files_are_touched(tmp_path: Path) -> None:
    """To let go of other memory would clear it."""
    path, data = mapped_file(tmp_path)
    assert is_mapped(data[5:100])
    computed = data[:4096] + np.uint8(1)
    writable = np.memmap(path, np.uint8, mode="r+")
    for array in (computed, data.copy(), np.arange(5000), writable, data[:0], data[::2]):
        assert not is_mapped(array)
        expected = np.array(array)
        release(array)
        np.testing.assert_array_equal(array, expected)
