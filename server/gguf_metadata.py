"""Reads the key-value metadata of a GGUF file: fast, and safe against hostile files.

Layout (GGUF specification, versions 2 and 3, little-endian): magic ``GGUF``, version u32, number of tensors
u64, number of pairs u64, then the pairs: key (u64 length, UTF-8), type u32, value. A string value is laid
out like a key; an array is its element type u32, its length u64 and its elements.
"""

from __future__ import annotations

import array
import mmap
import struct
import sys
from pathlib import Path
from typing import Any

_MAX_PAIRS = 65_536
_MAX_KEY_BYTES = 65_535
_MAX_ELEMENTS = 2**22
_MAX_METADATA_BYTES = 2**29

_STRING, _ARRAY, _BOOL = 8, 9, 7
# Type number -> struct code; the array module uses the same letters.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

_read_u64 = struct.Struct("<Q").unpack_from


class GgufError(Exception):
    """The file is not a GGUF file that can be read; the message says where it breaks."""


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """All key-value pairs of a GGUF file.

    Strings are ``str``, numbers ``int`` or ``float``, flags ``bool``; arrays of strings are ``list[str]``,
    arrays of numbers ``array.array``. Costs about 0.3 us a string: 30 ms for a vocabulary of 49k tokens and
    its merges.

    Raises:
        GgufError: not GGUF, cut off, or a count or length that the file cannot hold.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).read()
    except ValueError as error:  # mmap of an empty file
        raise GgufError(f"{path.name} is not a GGUF file: {error}") from None
    except GgufError as error:
        raise GgufError(f"{path.name} is not a readable GGUF file: {error}") from None
    except OSError as error:
        raise GgufError(f"{path.name} cannot be read: {error.strerror}") from None


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._end = min(len(data), _MAX_METADATA_BYTES)
        self._position = 0

    def read(self) -> dict[str, Any]:
        if self._take(4) != b"GGUF":
            raise GgufError("it does not start with the letters GGUF")
        version = self._u32()
        if version not in (2, 3):
            raise GgufError(f"version {version & 0xFFFFFFFF} is not supported (2 and 3 are, little-endian)")
        self._u64()  # number of tensors
        num_pairs = self._u64()
        if num_pairs > _MAX_PAIRS:
            raise GgufError(
                f"it claims {num_pairs} metadata pairs; {_MAX_PAIRS} is the most that is accepted"
            )
        pairs: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self._string("a key", _MAX_KEY_BYTES)
            if key in pairs:
                raise GgufError(f"the key {key!r} appears twice")
            pairs[key] = self._value(key, self._u32())
        return pairs

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            return self._array(key, self._u32(), self._u64())
        code = _SCALARS.get(kind)
        if code is None:
            raise GgufError(f"{key!r} has the unknown type {kind}")
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _array(self, key: str, kind: int, length: int) -> list[str] | array.array[Any]:
        if length > _MAX_ELEMENTS:
            raise GgufError(f"{key!r} claims {length} elements; {_MAX_ELEMENTS} is the most that is accepted")
        if kind == _STRING:
            return self._strings(key, length)
        code = "B" if kind == _BOOL else _SCALARS.get(kind)
        if code is None:
            raise GgufError(f"{key!r} is an array of the unsupported type {kind}")
        numbers: array.array[Any] = array.array(code)
        numbers.frombytes(self._take(length * struct.calcsize("<" + code)))
        if sys.byteorder == "big":
            numbers.byteswap()
        return numbers

    def _strings(self, key: str, length: int) -> list[str]:
        # The hot loop: half a million strings for a large vocabulary.
        data, position, end = self._data, self._position, self._end
        if length * 8 > end - position:
            raise GgufError(f"{key!r} claims {length} strings, more than the file can hold")
        strings = []
        try:
            for _ in range(length):
                start = position + 8
                position = start + _read_u64(data, position)[0]
                if position > end:
                    raise GgufError(f"{key!r} is cut off")
                strings.append(data[start:position].decode())
        except struct.error:
            raise GgufError(f"{key!r} is cut off") from None
        except UnicodeDecodeError:
            raise GgufError(f"element {len(strings)} of {key!r} is not valid UTF-8") from None
        self._position = position
        return strings

    def _string(self, key: str, limit: int = _MAX_METADATA_BYTES) -> str:
        length = self._u64()
        if length > limit:
            raise GgufError(f"{key!r} claims {length} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise GgufError(f"{key!r} is not valid UTF-8") from None

    def _u32(self) -> int:
        return int.from_bytes(self._take(4), "little")

    def _u64(self) -> int:
        return int.from_bytes(self._take(8), "little")

    def _take(self, length: int) -> bytes:
        start = self._position
        if length > self._end - start:
            raise GgufError("it is cut off")
        self._position = start + length
        return self._data[start : start + length]
