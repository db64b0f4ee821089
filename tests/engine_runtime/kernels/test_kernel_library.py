"""How kernels are found and launched, with a driver that only looks at what it is given."""

from __future__ import annotations

import ctypes
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine_runtime.kernels import kernel_library
from engine_runtime.kernels.kernel_library import KernelLibrary, KernelsMissingError
from engine_runtime.kernels.kernel_spec import MANIFEST, MANIFEST_VERSION

ARGUMENTS = [
    {"name": "flag", "type": "i32"},
    {"name": "x", "type": "*bf16"},
    {"name": "factor", "type": "fp32"},
    {"name": "map", "type": "tensor_map", "element": "bf16", "box": [64, 64], "swizzle": 3},
    {"name": "map.shape[0]", "type": "i32"},
    {"name": "map.stride[0]", "type": "i64"},
]
ENTRY = {
    "symbol": "f", "arguments": ARGUMENTS, "constexprs": {"BLOCK": 64}, "num_warps": 4,
    "shared_memory": 60_000, "starts_early": False, "source": "",
}  # fmt: skip


@dataclass
class Properties:
    compute_capability: tuple[int, int]
    max_shared_memory_per_block: int = 101_376


@dataclass
class Device:
    properties: Properties


class Stream:
    handle = 7


@dataclass
class Driver:
    """Takes the place of the driver's calls."""

    launches: list[tuple[Any, ...]] = field(default_factory=list)
    attributes: list[Any] = field(default_factory=list)
    num_early: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernel_library.driver, "cuModuleLoadData", lambda code: (0, code))
        monkeypatch.setattr(kernel_library.driver, "cuModuleGetFunction", lambda module, name: (0, name))
        monkeypatch.setattr(kernel_library.driver, "cuLaunchKernel", self.launch)
        monkeypatch.setattr(kernel_library.driver, "cuLaunchKernelEx", self.launch_early)
        monkeypatch.setattr(kernel_library.driver, "cuFuncSetAttribute", self.set_attribute)

    def set_attribute(self, function: Any, kind: Any, value: int) -> tuple[int]:
        self.attributes.append(value)
        return (0,)

    def launch_early(self, how: Any, function: Any, pointers: int, extra: int) -> tuple[int]:
        self.num_early += 1
        (attribute,) = how.attrs
        assert how.numAttrs == 1
        assert "PROGRAMMATIC_STREAM_SERIALIZATION" in str(attribute.id)
        assert attribute.value.programmaticStreamSerializationAllowed == 1
        grid, block = (
            (how.gridDimX, how.gridDimY, how.gridDimZ),
            (how.blockDimX, how.blockDimY, how.blockDimZ),
        )
        return self.launch(function, *grid, *block, how.sharedMemBytes, int(how.hStream), pointers)

    def launch(self, *args: Any) -> tuple[int]:
        sizes = [4, 8, 4, 128, 4, 8, 8, 8]
        pointers = (ctypes.c_void_p * len(sizes)).from_address(args[9])
        values = [ctypes.string_at(pointer, size) for pointer, size in zip(pointers, sizes, strict=True)]
        self.launches.append((*args[:9], values))
        return (0,)


def write(root: Path, architecture: int, version: int = MANIFEST_VERSION) -> None:
    folder = root / f"sm_{architecture}"
    folder.mkdir()
    kernels = {"k": ENTRY, "lost": ENTRY, "early": ENTRY | {"starts_early": True}}
    content = {"version": version, "architecture": architecture, "kernels": kernels}
    (folder / MANIFEST).write_text(json.dumps(content))
    (folder / "k.cubin").write_bytes(b"code")
    (folder / "early.cubin").write_bytes(b"code")


def library(root: Path, *capability: int, **properties: int) -> KernelLibrary:
    device: Any = Device(Properties((capability[0], capability[1]), **properties))
    return KernelLibrary(device, root)


@pytest.mark.parametrize(
    ("capability", "architecture"), [((8, 0), 80), ((8, 6), 86), ((8, 7), 86), ((8, 9), 86), ((9, 0), 90)]
)
def test_the_nearest_machine_code_is_taken(
    capability: tuple[int, int], architecture: int, tmp_path: Path
) -> None:
    for each in (80, 86, 90):
        write(tmp_path, each)
    assert library(tmp_path, *capability).architecture == architecture


@pytest.mark.parametrize("capability", [(7, 5), (9, 1), (10, 0), (12, 1)])
def test_a_gpu_without_machine_code_is_told_what_to_do(capability: tuple[int, int], tmp_path: Path) -> None:
    write(tmp_path, 80)
    write(tmp_path, 90)
    with pytest.raises(KernelsMissingError, match=r"sm_80, sm_90.*make kernels"):
        library(tmp_path, *capability)
    with pytest.raises(KernelsMissingError, match="there: nothing"):
        library(tmp_path / "none", *capability)


@pytest.mark.parametrize(
    ("name", "method", "is_early"),
    [("k", "launch", 0), ("k", "launch_early", 0), ("early", "launch", 0), ("early", "launch_early", 1)],
)
def test_arguments_are_laid_out_as_the_kernel_reads_them(
    name: str, method: str, is_early: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver()
    driver.install(monkeypatch)
    write(tmp_path, 90)
    kernel = library(tmp_path, 9, 0).get(name)
    assert driver.attributes == [60_000]
    assert kernel.argument_names == tuple(str(argument["name"]) for argument in ARGUMENTS)
    stream: Any = Stream()
    launch = getattr(kernel, method)
    for x in (2**47 + 16, 32):
        launch((3, 2, 1), stream, -5, x, 0.5, bytes(range(128)), 9, -1)
        *call, values = driver.launches[-1]
        assert call == [b"f", 3, 2, 1, 128, 1, 1, 60_000, 7]
        assert values[0] == struct.pack("i", -5)
        assert values[1] == struct.pack("Q", x)
        assert values[2] == struct.pack("f", 0.5)
        assert values[3] == bytes(range(128))
        assert values[4:] == [struct.pack("i", 9), struct.pack("q", -1), bytes(8), bytes(8)]
    assert driver.num_early == 2 * is_early
    with pytest.raises(struct.error):
        launch((1, 1, 1), stream, 1, 2)
    with pytest.raises(struct.error):
        launch((1, 1, 1), stream, -5, -1, 0.5, bytes(128), 9, -1)


def test_a_kernel_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Driver().install(monkeypatch)
    write(tmp_path, 80)
    kernels = library(tmp_path, 8, 0)
    assert kernels.get("k") is kernels.get("k")
    assert "k" in kernels
    assert "other" not in kernels


@pytest.mark.parametrize(
    ("name", "reason"), [("other", "no kernel other for .* 8.0"), ("lost", "make kernels")]
)
def test_a_missing_kernel_is_named(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Driver().install(monkeypatch)
    write(tmp_path, 80)
    with pytest.raises(KernelsMissingError, match=reason):
        library(tmp_path, 8, 0).get(name)


def test_a_kernel_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Driver().install(monkeypatch)
    write(tmp_path, 80)
    with pytest.raises(KernelsMissingError, match="60000 bytes of shared memory"):
        library(tmp_path, 8, 0, max_shared_memory_per_block=49_152).get("k")


def test_names_are_those_of_kernels_that_fit(tmp_path: Path) -> None:
    write(tmp_path, 80)
    assert library(tmp_path, 8, 0).names == ("k", "lost", "early")
    assert library(tmp_path, 8, 0, max_shared_memory_per_block=49_152).names == ()


def test_a_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 80, version=0)
    with pytest.raises(KernelsMissingError, match="another version"):
        library(tmp_path, 8, 0)
