"""Compiles the Triton kernels to machine code, without a GPU: ``python -m engine_runtime.kernels.compile``.

For each architecture a folder ``cubins/sm_90`` with ``NAME.cubin`` and ``manifest.json``, which tells
``KernelLibrary`` how each is launched. A kernel whose source, types and options are as before is kept.
The output depends on these and on Triton's version only.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine_runtime.kernels.kernel_spec import (
    ARCHITECTURES,
    CUBINS,
    MANIFEST,
    MANIFEST_VERSION,
    KernelSpec,
)

PACKAGE = "engine_runtime.kernels.triton"


class CompilationError(Exception):
    """Some kernels could not be compiled; the message names them."""


def kernel_modules() -> list[str]:
    """The modules of the package that holds the kernels."""
    package = importlib.import_module(PACKAGE)
    return sorted(f"{PACKAGE}.{info.name}" for info in pkgutil.iter_modules(package.__path__))


def specs_of(modules: Iterable[str], architecture: int) -> dict[str, tuple[str, KernelSpec]]:
    """Kernel name -> (module, spec), for one architecture.

    Raises:
        ValueError: two kernels of one name.
    """
    found: dict[str, tuple[str, KernelSpec]] = {}
    for module in modules:
        for spec in getattr(importlib.import_module(module), "SPECS", ()):
            if architecture in spec.architectures:
                if spec.name in found:
                    raise ValueError(f"two kernels are called {spec.name} on {architecture}")
                found[spec.name] = module, spec
    return found


def compile_kernels(
    modules: Sequence[str], architectures: Sequence[int], folder: Path = CUBINS, num_processes: int = 1
) -> tuple[int, int]:
    """Brings ``folder`` up to date; what the modules no longer declare is removed from it.

    Returns:
        (number compiled, number kept)

    Raises:
        CompilationError: after everything else was compiled and written.
    """
    todo = []
    kept: dict[int, dict[str, Any]] = {}
    for architecture in architectures:
        old = _read_manifest(folder / f"sm_{architecture}")
        kept[architecture] = {}
        for name, (module, spec) in specs_of(modules, architecture).items():
            key = _source_hash(spec, architecture)
            cubin = folder / f"sm_{architecture}" / f"{name}.cubin"
            if old.get(name, {}).get("source") == key and cubin.is_file():
                kept[architecture][name] = old[name]
            else:
                todo.append((module, name, architecture, key))
    num_kept = sum(map(len, kept.values()))
    failures = []
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(num_processes, context, initializer=_start_worker, initargs=(scratch,)) as pool,
    ):
        futures = {pool.submit(_compile, *task): task for task in todo}
        # All architectures take minutes. None: not where nobody looks.
        bar = tqdm(futures.items(), "Compiling", unit=" kernels", disable=None if todo else True)
        for future, (_, name, architecture, _) in bar:
            try:
                entry, cubin_bytes = future.result()
            except BrokenProcessPool:
                raise
            except Exception as error:
                failures.append(f"{name} for {architecture}: {error}")
                continue
            kept[architecture][name] = entry
            _write(folder / f"sm_{architecture}" / f"{name}.cubin", cubin_bytes)
    for architecture, entries in kept.items():
        _finish(folder / f"sm_{architecture}", architecture, entries)
    if failures:
        raise CompilationError("\n".join(failures))
    return len(todo), num_kept


def _start_worker(scratch: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = scratch
    # Line tables would hold the paths of this machine.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"


def _compile(module: str, name: str, architecture: int, key: str) -> tuple[dict[str, Any], bytes]:
    """In a worker: machine code, and the kernel's entry in the manifest."""
    import triton
    from triton.backends.compiler import GPUTarget

    _, spec = specs_of([module], architecture)[name]
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "maxnreg": spec.max_registers}
    compiled = triton.compile(_source(spec), target=GPUTarget("cuda", architecture, 32), options=options)
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise ValueError("needs scratch memory, which launches do not provide")
    if metadata.num_ctas != 1:
        raise ValueError("needs clusters, which launches do not provide")
    entry = {
        "symbol": metadata.name,
        "arguments": _arguments(spec, metadata.tensordesc_meta),
        "constexprs": {key: _plain(value) for key, value in spec.constexprs.items()},
        "num_warps": metadata.num_warps,
        "shared_memory": metadata.shared,
        "starts_early": spec.starts_early,
        "source": key,
    }
    return entry, compiled.asm["cubin"]


def _source(spec: KernelSpec) -> Any:
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = spec.function.arg_names
    missing = set(names) - set(spec.signature) - set(spec.constexprs)
    unknown = (set(spec.signature) | set(spec.constexprs)) - set(names)
    if missing or unknown:
        raise ValueError(f"{spec.name}: missing {sorted(missing)}, unknown {sorted(unknown)}")
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        kind, multiple = _split_type(spec.signature.get(name, "constexpr"))
        signature[name] = kind
        if multiple:
            attributes[(index,)] = [["tt.divisibility", int(multiple)]]
    source = GluonASTSource if spec.function.is_gluon() else ASTSource
    return source(spec.function, signature, dict(spec.constexprs), attributes)


def _source_hash(spec: KernelSpec, architecture: int) -> str:
    import triton

    parts = (
        MANIFEST_VERSION, triton.__version__, architecture, _source(spec).hash(),
        sorted(spec.signature.items()), spec.num_warps, spec.num_stages, spec.max_registers,
        spec.starts_early,
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _arguments(spec: KernelSpec, tensor_maps: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """What a launch passes, in order."""
    maps = iter(tensor_maps or ())
    result: list[dict[str, Any]] = []
    for name in spec.function.arg_names:
        if name in spec.constexprs:
            continue
        kind, multiple = _split_type(spec.signature[name])
        if descriptor := re.fullmatch(r"tensordesc<(\w+)\[([\d, ]+)\].*>", kind):
            layout = next(maps, None)
            if layout is None:
                raise ValueError("tensor maps need compute capability 9.0")
            rank = descriptor[2].count(",") + 1
            result.append(
                {
                    "name": name,
                    "type": "tensor_map",
                    "element": descriptor[1],
                    "box": list(layout["block_size"]),
                    "swizzle": int(layout["swizzle"]),
                }
            )
            result += [{"name": f"{name}.shape[{i}]", "type": "i32"} for i in range(rank)]
            result += [{"name": f"{name}.stride[{i}]", "type": "i64"} for i in range(rank)]
            continue
        entry: dict[str, Any] = {"name": name, "type": kind}
        if multiple:
            entry["multiple_of"] = int(multiple)
        result.append(entry)
    return result


def _split_type(text: str) -> tuple[str, str]:
    """``*bf16:16`` -> (``*bf16``, ``16``)."""
    if text.startswith("tensordesc"):
        return text, ""
    kind, _, multiple = text.partition(":")
    return kind, multiple


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    kernels = manifest.get("kernels", {}) if manifest.get("version") == MANIFEST_VERSION else {}
    return dict(kernels)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def _finish(folder: Path, architecture: int, entries: dict[str, Any]) -> None:
    manifest = {"version": MANIFEST_VERSION, "architecture": architecture, "kernels": entries}
    _write(folder / MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    for cubin in folder.glob("*.cubin*"):
        if cubin.name.removesuffix(".cubin") not in entries:
            cubin.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m engine_runtime.kernels.compile", description=__doc__)
    parser.add_argument(
        "--arch", type=int, action="append", choices=ARCHITECTURES, help="only this one; may be repeated"
    )
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16), help="processes")
    parser.add_argument("--folder", type=Path, default=CUBINS, help="where to write")
    parser.add_argument(
        "--module", action="append", help=f"only the kernels of this module (default: all in {PACKAGE})"
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    try:
        compiled, kept = compile_kernels(
            arguments.module or kernel_modules(),
            arguments.arch or ARCHITECTURES,
            arguments.folder,
            arguments.jobs,
        )
    except CompilationError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{compiled} kernels compiled, {kept} unchanged, {time.monotonic() - start:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
