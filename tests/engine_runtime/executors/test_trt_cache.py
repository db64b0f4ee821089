"""Entries of the cache: hits, misses, damage, disks that refuse, two processes at once."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import stat
from dataclasses import fields, replace
from pathlib import Path

import pytest

from engine_runtime.executors.tensorrt.engine_cache import (
    CacheKey,
    EngineCache,
    compiled_kernels_key,
    default_cache_folder,
    segment_key,
)
from engine_runtime.executors.tensorrt.trt_builder import TrtBuilder
from engine_runtime.models.build import build_segment
from engine_runtime.models.segment import Segment
from tests.engine_runtime.tiny_configs import tiny_config

KEY = CacheKey(
    content="engine",
    kind="middle",
    dtype="bfloat16",
    num_tokens=16,
    graph="ab" * 32,
    formulation="merged",
    quantization="none",
    tensor_parallel_size=1,
    library="tensorrt_rtx 1.6.1.120",
    target="sm_90",
)


def test_what_was_stored_is_found_again(tmp_path: Path) -> None:
    EngineCache(tmp_path).store(KEY, b"engine")
    assert EngineCache(tmp_path).load(KEY) == b"engine"


@pytest.mark.parametrize("field", [field.name for field in fields(CacheKey)])
def test_any_other_key_is_a_miss(tmp_path: Path, field: str) -> None:
    cache = EngineCache(tmp_path)
    cache.store(KEY, b"engine")
    value = getattr(KEY, field)
    other = replace(KEY, **{field: value + 1 if isinstance(value, int) else f"{value}x"})
    assert cache.load(other) is None


@pytest.mark.parametrize("position", [0, 13, 40, 200, -1])
def test_damage_is_noticed(tmp_path: Path, position: int, caplog: pytest.LogCaptureFixture) -> None:
    cache = EngineCache(tmp_path)
    cache.store(KEY, b"engine" * 50)
    path = tmp_path / KEY.file_name
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    assert cache.load(KEY) is None
    assert "damaged" in caplog.text


@pytest.mark.parametrize("length", [0, 5, 100, 400])
def test_a_cut_file_is_noticed(tmp_path: Path, length: int) -> None:
    cache = EngineCache(tmp_path)
    cache.store(KEY, b"engine" * 50)
    path = tmp_path / KEY.file_name
    path.write_bytes(path.read_bytes()[:length])
    assert cache.load(KEY) is None


def test_an_entry_under_a_foreign_name_is_not_used(tmp_path: Path) -> None:
    """As after a collision of names, or a file copied by hand from another version."""
    cache = EngineCache(tmp_path)
    other = replace(KEY, library="tensorrt_rtx 1.7.0.1")
    cache.store(other, b"engine")
    os.rename(tmp_path / other.file_name, tmp_path / KEY.file_name)
    assert cache.load(KEY) is None


def test_the_folder_is_private(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "inflightd"
    EngineCache(folder).store(KEY, b"engine")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / KEY.file_name).stat().st_mode) == 0o600


def test_a_full_disk_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    cache = EngineCache(tmp_path)
    with caplog.at_level(logging.WARNING):
        cache.store(KEY, b"engine")
        cache.store(replace(KEY, num_tokens=32), b"engine")
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = EngineCache(tmp_path / "file" / "inflightd")
    assert cache.load(KEY) is None
    caplog.clear()
    cache.store(KEY, b"engine")
    cache.store(KEY, b"engine")
    assert len(caplog.records) == 1


def test_the_default_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_cache_folder() == Path("/elsewhere/inflightd")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_folder() == Path.home() / ".cache/inflightd"


def _store_often(folder: Path, byte: int) -> None:
    cache = EngineCache(folder)
    for _ in range(200):
        cache.store(KEY, bytes([byte]) * 100_000)
        entry = cache.load(KEY)
        assert entry is not None
        assert entry[:1] * 100_000 == entry


def test_two_processes_at_once_see_whole_entries(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_store_often, args=(tmp_path, byte)) for byte in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == [KEY.file_name]


def test_engines_are_built_once_and_again_after_damage(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    built = []

    def segment() -> Segment:
        built.append(1)
        return build_segment(tiny_config("llama"), "middle", "bfloat16", 16)

    key = segment_key(build_segment(tiny_config("llama"), "middle", "bfloat16", 16), "sm_80")
    builder = TrtBuilder([(8, 0)])
    first = EngineCache(tmp_path).engine(key, segment, builder)
    assert EngineCache(tmp_path).engine(key, segment, builder) == first
    assert len(built) == 1
    path = tmp_path / key.file_name
    path.write_bytes(path.read_bytes()[:-1])
    EngineCache(tmp_path).engine(key, segment, builder)
    assert len(built) == 2
    assert EngineCache(tmp_path).load(key) is not None


def test_models_of_one_shape_share_engines_and_others_do_not() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

    def key(architecture: str, **changes: object) -> CacheKey:
        return segment_key(
            build_segment(tiny_config(architecture, **changes), "middle", "bfloat16", 16), "sm_90"
        )

    assert key("llama") == key("mistral")
    assert key("llama") == key("llama", num_hidden_layers=2, vocab_size=999)
    others = [key("llama", hidden_size=96), key("llama", rms_norm_eps=1e-5), key("qwen2")]
    assert len({key("llama"), *others}) == 4
    assert compiled_kernels_key(key("llama"), "NVIDIA H200") != compiled_kernels_key(key("llama"), "A100")


def test_an_open_token_count_has_no_key() -> None:
    with pytest.raises(ValueError, match="one token count"):
        segment_key(build_segment(tiny_config("llama"), "middle", "bfloat16"), "sm_90")
