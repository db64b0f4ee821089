"""Who may import whom (README, "How it is built"). Read from the sources, function-level imports included."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imports_of(source: Path) -> set[str]:
    """Dotted names that a file imports; ``from a import b`` counts as both ``a`` and ``a.b``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files_of(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


def below(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("source", files_of("scheduler"), ids=lambda p: p.name)
def test_the_scheduler_needs_the_standard_library_only(source: Path) -> None:
    strangers = {
        name
        for name in imports_of(source)
        if name.split(".")[0] not in sys.stdlib_module_names and not below(name, {"scheduler"})
    }
    assert not strangers


@pytest.mark.parametrize("source", files_of("engine_runtime"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_runtime_knows_the_scheduler_by_its_messages_only(source: Path) -> None:
    allowed = {"scheduler.messages", "scheduler.executor"}
    for name in imports_of(source):
        assert not below(name, {"server"}), name
        if below(name, {"scheduler"}):
            assert name == "scheduler" or below(name, allowed), name


@pytest.mark.parametrize("source", files_of("server"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_server_knows_the_engine_by_its_messages_only(source: Path) -> None:
    if source.name in {"transport.py", "launch.py"}:
        return
    for name in imports_of(source):
        assert not below(name, {"engine_runtime"}), name
        if below(name, {"scheduler"}):
            assert name == "scheduler" or below(name, {"scheduler.messages"}), name


@pytest.mark.parametrize(
    "source", files_of("server") + files_of("engine_runtime"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_the_daemon_needs_no_torch_and_keeps_devices_in_their_place(source: Path) -> None:
    names = imports_of(source)
    assert not any(below(name, {"torch"}) for name in names)
    place = source.relative_to(ROOT).as_posix()
    device_code = (
        "engine_runtime/cuda.py",
        "engine_runtime/executors/tensorrt/",
        "engine_runtime/kernels/",
    )
    if not place.startswith(device_code):
        devices = {"tensorrt", "tensorrt_rtx", "cuda", "triton"}
        assert not any(below(name, devices) for name in names)


def test_kernels_are_compiled_without_what_launches_them() -> None:
    """The image's compiler has no package of CUDA's."""
    todo = {"engine_runtime.kernels.compile"}
    todo |= {
        f"engine_runtime.kernels.triton.{path.stem}" for path in files_of("engine_runtime/kernels/triton")
    }
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        seen.add(name)
        path = ROOT / (name.replace(".", "/") + ".py")
        if path.exists():
            todo |= imports_of(path) - seen
    assert "engine_runtime.kernels.kernel_spec" in seen
    assert not any(below(name, {"cuda", "tensorrt", "tensorrt_rtx"}) for name in seen)


def test_the_running_processes_load_their_own_half_only() -> None:
    import subprocess

    script = "import sys; import {module}; print(' '.join(sys.modules))"

    def loaded(module: str) -> set[str]:
        done = subprocess.run(
            [sys.executable, "-c", script.format(module=module)], capture_output=True, text=True, check=True
        )
        names = set(done.stdout.split())
        assert "opentelemetry.sdk" not in names  # only where traces are sent
        return {name.split(".")[0] for name in names}

    assert not loaded("server.app") & {"onnxruntime", "numba", "onnx", "torch", "triton", "engine_runtime"}
    gpu = loaded("engine_runtime.executors.tensorrt.factory")
    assert not gpu & {"onnxruntime", "numba", "llvmlite", "torch", "triton", "transformers"}
    engine = loaded("engine_runtime.factory")
    assert not engine & {"fastapi", "uvicorn", "transformers", "torch", "triton", "server"}
