"""The ahead-of-time compiler, on small kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from engine_runtime.kernels.compile import CompilationError, compile_kernels, kernel_modules, specs_of
from engine_runtime.kernels.kernel_spec import ARCHITECTURES, MANIFEST

TINY = "tests.engine_runtime.kernels.tiny_kernels"
BROKEN = "tests.engine_runtime.kernels.broken_kernels"


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return content


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cubins")
    assert compile_kernels([TINY], (80, 90), folder) == (3, 0)
    return folder


def test_the_manifest_says_how_to_launch(cubins: Path) -> None:
    assert {path.name for path in (cubins / "sm_80").iterdir()} == {"add.cubin", MANIFEST}
    assert (cubins / "sm_80" / "add.cubin").read_bytes().startswith(b"\x7fELF")
    content = manifest(cubins / "sm_90")
    assert content["architecture"] == 90
    add, copy = content["kernels"]["add"], content["kernels"]["copy_tile"]
    assert (add["symbol"], add["num_warps"], add["constexprs"]) == ("add", 2, {"BLOCK": 128})
    assert add["arguments"] == [
        {"name": "x", "type": "*fp32", "multiple_of": 16},
        {"name": "y", "type": "*fp32", "multiple_of": 16},
        {"name": "out", "type": "*fp32"},
        {"name": "factor", "type": "fp32"},
        {"name": "n", "type": "i32"},
    ]
    assert copy["arguments"][0] == {
        "name": "source", "type": "tensor_map", "element": "bf16", "box": [64, 64], "swizzle": 3,
    }  # fmt: skip
    assert [argument["type"] for argument in copy["arguments"][1:]] == ["i32", "i32", "i64", "i64", "*bf16"]
    assert copy["shared_memory"] >= 64 * 64 * 2


def test_nothing_of_this_machine_is_compiled_in(cubins: Path) -> None:
    for path in cubins.rglob("*.cubin"):
        assert str(Path(__file__).parents[3]).encode() not in path.read_bytes()


def test_what_is_unchanged_is_kept_and_what_is_gone_removed(cubins: Path) -> None:
    before = {path: path.read_bytes() for path in cubins.rglob("*.*")}
    (cubins / "sm_80" / "old.cubin").write_bytes(b"")
    (cubins / "sm_80" / "add.cubin.partial").write_bytes(b"")
    (cubins / "sm_90" / "add.cubin").unlink()
    assert compile_kernels([TINY], (80, 90), cubins) == (1, 2)
    assert {path: path.read_bytes() for path in cubins.rglob("*.*")} == before


def test_a_failure_is_reported_after_the_rest_is_written(tmp_path: Path) -> None:
    with pytest.raises(CompilationError, match="broken for 80"):
        compile_kernels([BROKEN], (80,), tmp_path)
    assert list(manifest(tmp_path / "sm_80")["kernels"]) == ["add"]


def test_an_argument_without_a_type_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.engine_runtime.kernels import tiny_kernels

    monkeypatch.setattr(tiny_kernels, "SPECS", [tiny_kernels.FORGOTTEN])
    with pytest.raises(ValueError, match=r"forgotten: missing \['x'\]"):
        compile_kernels([TINY], (80,), tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_specs_of_all_kernels_agree_with_their_functions(architecture: int) -> None:
    specs = specs_of(kernel_modules(), architecture)
    assert specs
    for name, (_, spec) in specs.items():
        names = set(spec.function.arg_names)
        assert set(spec.signature) | set(spec.constexprs) == names, name
        assert not set(spec.signature) & set(spec.constexprs), name
