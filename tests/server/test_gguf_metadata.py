"""The reader of GGUF metadata against files written by the gguf package, and against damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from server.gguf_metadata import GgufError, read_gguf_metadata


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60_000)
    writer.add_int16("i16", -30_000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**62))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("flag", True)
    writer.add_string("text", "é\n日本")
    writer.add_array("strings", ["", "a", "▁b", "x" * 300])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("floats", [0.5, -1.5])
    writer.add_array("flags", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_reads_what_the_gguf_package_writes(gguf_path: Path) -> None:
    metadata = read_gguf_metadata(gguf_path)
    arrays = {key: list(metadata.pop(key)) for key in ("strings", "numbers", "floats", "flags")}
    assert arrays == {
        "strings": ["", "a", "▁b", "x" * 300],
        "numbers": [1, -2, 3],
        "floats": [0.5, -1.5],
        "flags": [1, 0],
    }
    assert metadata == {
        "general.architecture": "llama",
        "u8": 200,
        "i8": -100,
        "u16": 60_000,
        "i16": -30_000,
        "u32": 4_000_000_000,
        "i32": -2_000_000_000,
        "u64": 2**63,
        "i64": -(2**62),
        "f32": 0.5,
        "f64": 0.1,
        "flag": True,
        "text": "é\n日本",
    }
    assert metadata["flag"] is True


def test_every_cut_is_refused(gguf_path: Path, tmp_path: Path) -> None:
    whole = gguf_path.read_bytes()
    cut = tmp_path / "cut.gguf"
    # The writer pads nothing after the last pair here, so no shorter file is whole.
    for length in [*range(64), *range(64, len(whole) - 16, 7), *range(len(whole) - 16, len(whole))]:
        cut.write_bytes(whole[:length])
        with pytest.raises(GgufError):
            read_gguf_metadata(cut)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_never_does_worse_than_an_error(gguf_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(gguf_path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(damaged) - 1))
        damaged[position] = data.draw(st.integers(0, 255))
    path = gguf_path.with_name("damaged.gguf")
    path.write_bytes(damaged)
    try:
        read_gguf_metadata(path)
    except GgufError:
        return


def header(pairs: int, version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, 0, pairs)


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def string_array(length: int, *strings: bytes) -> bytes:
    return struct.pack("<IQ", 8, length) + b"".join(struct.pack("<Q", len(s)) + s for s in strings)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"GGML" + bytes(20), "GGUF"),
        (header(0, version=1), "version 1"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "version"),
        (header(2**63), "pairs"),
        (header(1) + struct.pack("<Q", 2**63), "bytes"),
        (header(1) + struct.pack("<Q", 70_000) + bytes(70_000), "bytes"),
        (header(1) + pair(b"k", 99, bytes(8)), "type 99"),
        (header(1) + pair(b"k", 8, struct.pack("<Q", 2**63)), "bytes"),
        (header(1) + pair(b"k", 8, struct.pack("<Q", 2) + b"\xff\xff"), "UTF-8"),
        (header(1) + pair(b"k", 9, struct.pack("<IQ", 5, 2**62)), "elements"),
        (header(1) + pair(b"k", 9, struct.pack("<IQ", 8, 2**21)), "strings"),
        (header(1) + pair(b"k", 9, struct.pack("<IQ", 9, 1) + bytes(64)), "type 9"),
        (header(1) + pair(b"k", 9, string_array(2, b"a")), "hold"),
        (header(1) + pair(b"k", 9, string_array(1, b"a") + b"")[:-1], "cut off"),
        (header(1) + pair(b"k", 9, string_array(1, b"\xe2\x96")), "UTF-8"),
        (header(2) + pair(b"k", 7, b"\1") * 2, "twice"),
    ],
)
def test_hostile_files_are_refused_by_reason(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(GgufError, match=reason):
        read_gguf_metadata(path)


def test_a_missing_file_is_an_error_of_the_same_kind(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="cannot be read"):
        read_gguf_metadata(tmp_path / "none.gguf")
