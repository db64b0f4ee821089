"""Headers as the gguf package writes them; damaged ones are refused, whatever is wrong with them."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from engine_runtime.weights.errors import CheckpointError
from engine_runtime.weights.gguf_file import MAX_METADATA_ENTRIES, MAX_TENSORS, ArrayLength, GgufFile


def header(version: int = 3, num_tensors: int = 0, num_entries: int = 0, magic: bytes = b"GGUF") -> bytes:
    return struct.pack("<4sIQQ", magic, version, num_tensors, num_entries)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def tensor_info(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % 32)


def write_good(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.uint", 7)
    writer.add_int64("a.int64", -(1 << 40))
    writer.add_float32("a.float", 0.5)
    writer.add_float64("a.double", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "größer")
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.texts", ["x", "yy", ""])
    writer.add_array("a.long", list(range(5000)))
    writer.add_tensor("plain", np.arange(6, dtype=np.float32).reshape(2, 3))
    quantized = gguf.quantize(np.ones((3, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("quantized", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_the_package_wrote(tmp_path: Path) -> None:
    path = write_good(tmp_path / "x.gguf")
    file = GgufFile(path)
    assert {key: value for key, value in file.metadata.items() if key.startswith("a.")} == {
        "a.uint": 7,
        "a.int64": -(1 << 40),
        "a.float": 0.5,
        "a.double": 0.1,
        "a.bool": True,
        "a.text": "größer",
        "a.numbers": [1, 2, 3],
        "a.texts": ArrayLength(3),
        "a.long": ArrayLength(5000),
    }
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert set(file.tensors) == set(theirs)
    for name, tensor in file.tensors.items():
        assert tensor.start == theirs[name].data_offset
        assert tensor.end - tensor.start == theirs[name].n_bytes
        assert tensor.quantization == theirs[name].tensor_type
        assert tensor.shape == tuple(theirs[name].shape[::-1])


def test_every_cut_is_refused(tmp_path: Path) -> None:
    data = write_good(tmp_path / "x.gguf").read_bytes()
    end = max(tensor.end for tensor in GgufFile(tmp_path / "x.gguf").tensors.values())
    path = tmp_path / "cut.gguf"
    # Past the list of 5000 numbers, every 293rd place does.
    for length in [*range(600), *range(600, end, 293), end - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf is no valid GGUF file"):
            GgufFile(path)


BAD_FILES: dict[str, bytes] = {
    "another magic": header(magic=b"GGML"),
    "version 1": header(version=1),
    "big-endian": struct.pack(">4sIQQ", b"GGUF", 3, 0, 0),
    "too many tensors": header(num_tensors=MAX_TENSORS + 1),
    "2^64 - 1 entries": header(num_entries=(1 << 64) - 1),
    "too many entries": header(num_entries=MAX_METADATA_ENTRIES + 1),
    "a name of 2^63 bytes": header(num_entries=1) + struct.pack("<Q", 1 << 63),
    "a name beyond the file": header(num_entries=1) + struct.pack("<Q", 50) + b"abc",
    "a text of 2^64 - 1 bytes": header(num_entries=1) + text("k") + struct.pack("<IQ", 8, (1 << 64) - 1),
    "invalid UTF-8": header(num_entries=1) + text(b"\xff\xfe") + struct.pack("<IB", 0, 1),
    "an unknown type": header(num_entries=1) + text("k") + struct.pack("<IB", 77, 1),
    "a key twice": header(num_entries=2) + 2 * (text("k") + struct.pack("<IB", 0, 1)),
    "an array of 2^62 numbers": header(num_entries=1) + text("k") + struct.pack("<IIQ", 9, 4, 1 << 62),
    "an array of 2^62 texts": header(num_entries=1) + text("k") + struct.pack("<IIQ", 9, 8, 1 << 62),
    "an array longer than the file": header(num_entries=1) + text("k") + struct.pack("<IIQ", 9, 8, 1 << 20),
    "an array of texts whose length wraps": header(num_entries=1)
    + text("k")
    + struct.pack("<IIQQ", 9, 8, 2, (1 << 64) - 8),
    "an array of arrays": header(num_entries=1) + text("k") + struct.pack("<IIQ", 9, 9, 1),
    "alignment 0": header(num_entries=1) + text("general.alignment") + struct.pack("<II", 4, 0),
    "alignment 24": header(num_entries=1) + text("general.alignment") + struct.pack("<II", 4, 24),
    "alignment as text": header(num_entries=1)
    + text("general.alignment")
    + struct.pack("<I", 8)
    + text("32"),
    "five dimensions": header(num_tensors=1) + tensor_info("t", (1, 1, 1, 1, 1)),
    "2^31 dimensions": header(num_tensors=1) + text("t") + struct.pack("<I", 1 << 31),
    "an unknown quantization": header(num_tensors=1) + tensor_info("t", (32,), kind=999),
    "a shape whose product overflows": header(num_tensors=1) + tensor_info("t", (1 << 33, 1 << 33)),
    "half a block": header(num_tensors=1) + tensor_info("t", (16,), kind=8),
    "an offset beyond the file": header(num_tensors=1) + tensor_info("t", (8,), offset=1 << 40),
    "an offset that wraps": header(num_tensors=1) + tensor_info("t", (8,), offset=(1 << 64) - 32),
    "an unaligned offset": padded(header(num_tensors=1) + tensor_info("t", (1,), offset=4)) + bytes(64),
    "overlapping tensors": padded(
        header(num_tensors=2) + tensor_info("t", (16,)) + tensor_info("u", (8,), offset=32)
    )
    + bytes(64),
    "a tensor twice": padded(header(num_tensors=2) + 2 * tensor_info("t", (8,))) + bytes(64),
}


@pytest.mark.parametrize("case", sorted(BAD_FILES))
def test_bad_header_is_refused_quickly(case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(BAD_FILES[case])
    started = time.process_time()
    with pytest.raises(CheckpointError, match=r"x\.gguf is no valid GGUF file"):
        GgufFile(path)
    assert time.process_time() - started < 1


def test_random_damage_never_escapes_the_checks(tmp_path: Path) -> None:
    random = np.random.RandomState(5)
    good = write_good(tmp_path / "x.gguf").read_bytes()
    path = tmp_path / "bad.gguf"
    num_refused = 0
    for _ in range(200):
        bad = bytearray(good)
        for _ in range(random.randint(1, 5)):
            bad[random.randint(600)] = random.choice([0, 1, 127, 128, 255, random.randint(256)])
        path.write_bytes(bad)
        try:
            file = GgufFile(path)
            for tensor in file.tensors.values():
                assert 0 <= tensor.start <= tensor.end <= len(bad)
        except CheckpointError:
            num_refused += 1
    assert num_refused > 40


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*none\.gguf: No such file"):
        GgufFile(tmp_path / "none.gguf")


def test_headers_of_large_vocabularies_take_little_time(smollm2_path: Path) -> None:
    started = time.process_time()
    file = GgufFile(smollm2_path)
    assert time.process_time() - started < 0.5
    assert file.metadata["tokenizer.ggml.tokens"] == ArrayLength(49152)
    assert len(file.tensors) == 272
