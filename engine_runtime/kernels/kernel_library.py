"""Compiled kernels of a device, and their launches."""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cuda.bindings import driver

from engine_runtime.cuda import CudaDevice, Stream, checked
from engine_runtime.kernels.kernel_spec import CUBINS, MANIFEST, MANIFEST_VERSION

# Python's struct formats; alignment is the size, as in CUDA's parameter buffer.
_FORMATS = {
    "i1": "B", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp32": "f", "fp64": "d",
}  # fmt: skip
_MAP_TYPES = {
    "fp16": driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    "bf16": driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    "fp32": driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    "fp8e4nv": driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    "i8": driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    "u8": driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
}
_ITEM_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp8e4nv": 1, "i8": 1, "u8": 1}
_SWIZZLES = (
    driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
    driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_32B,
    driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_64B,
    driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
)
_DEFAULT_SHARED_MEMORY = 48 * 1024


class KernelsMissingError(RuntimeError):
    """There is no machine code for this GPU, or not of this kernel."""


class Kernel:
    """One compiled kernel. Used by one thread."""

    def __init__(self, name: str, entry: dict[str, Any], code: bytes, max_shared_memory: int) -> None:
        """
        Args:
            entry: of the manifest.
            max_shared_memory: bytes that the device gives a program.

        Raises:
            CudaError: the driver does not take the code.
            KernelsMissingError: the kernel needs more shared memory than the device has.
        """
        self.name = name
        self.constexprs: dict[str, Any] = entry["constexprs"]
        self._arguments: list[dict[str, Any]] = entry["arguments"]
        self._num_threads = 32 * entry["num_warps"]
        self._shared_memory = entry["shared_memory"]
        if self._shared_memory > max_shared_memory:
            raise KernelsMissingError(
                f"kernel {name} needs {self._shared_memory} bytes of shared memory, "
                f"and the GPU gives {max_shared_memory}"
            )
        self._module = checked(driver.cuModuleLoadData(code))
        self._function = checked(driver.cuModuleGetFunction(self._module, entry["symbol"].encode()))
        if self._shared_memory > _DEFAULT_SHARED_MEMORY:
            kind = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(driver.cuFuncSetAttribute(self._function, kind, self._shared_memory))
        # Triton's kernels end with two pointers to scratch memory, which ours do not need (see compile.py).
        formats = [_format_of(argument["type"]) for argument in self._arguments] + ["Q", "Q"]
        layout = struct.Struct("".join(formats))
        self._buffer = ctypes.create_string_buffer(layout.size)
        start = ctypes.addressof(self._buffer)
        offsets = [struct.calcsize("".join(formats[: i + 1])) for i in range(len(formats))]
        self._pointers = (ctypes.c_void_p * len(formats))(
            *(start + end - struct.calcsize(kind) for end, kind in zip(offsets, formats, strict=True))
        )
        self._pointers_address = ctypes.addressof(self._pointers)
        self._pack_into = layout.pack_into
        self._early = _early_launch(self._num_threads, self._shared_memory) if entry["starts_early"] else None

    @property
    def argument_names(self) -> tuple[str, ...]:
        """In the order of ``launch``."""
        return tuple(argument["name"] for argument in self._arguments)

    def launch(self, grid: tuple[int, int, int], stream: Stream, *args: Any) -> None:
        """Enqueues the kernel, also while the stream is captured. The values are copied.

        Args:
            grid: numbers of programs, each at least 1.
            args: addresses and integers as int, floats as float, in the order of ``argument_names``; a tensor
                map and its sizes and strides as ``*tensor_map(...)``.

        Raises:
            struct.error: another number of arguments, or a value of another type.
            CudaError: the launch was refused, or earlier work on the device failed.
        """
        self._pack_into(self._buffer, 0, *args, 0, 0)
        (code,) = driver.cuLaunchKernel(
            self._function, *grid, self._num_threads, 1, 1, self._shared_memory,
            stream.handle, self._pointers_address, 0,
        )  # fmt: skip
        if code:
            checked((code,))

    def launch_early(self, grid: tuple[int, int, int], stream: Stream, *args: Any) -> None:
        """``launch``, so that programs may start while the launch before it still runs.

        Worth it where launches are short. Kernels that were not made for it (``starts_early`` of their spec)
        start when they always do. What a kernel reads before it waits must not come from the launch before,
        nor from earlier ones if that one lets others start before it waits itself, as products do.
        """
        if self._early is None:
            self.launch(grid, stream, *args)
            return
        self._pack_into(self._buffer, 0, *args, 0, 0)
        self._early.gridDimX, self._early.gridDimY, self._early.gridDimZ = grid
        self._early.hStream = stream.handle
        (code,) = driver.cuLaunchKernelEx(self._early, self._function, self._pointers_address, 0)
        if code:
            checked((code,))

    def tensor_map(
        self, name: str, address: int, shape: Sequence[int], strides: Sequence[int]
    ) -> tuple[Any, ...]:
        """How the tensor memory accelerator finds an array; to be made once, it costs some microseconds.

        Args:
            name: of the argument.
            address: of the array, a multiple of 16.
            shape: slowest dimension first; what a tile has outside of it reads as zero.
            strides: in elements; the last is 1, the others multiples of 16 bytes.

        Returns:
            The arguments to pass: the map, sizes and strides.

        Raises:
            CudaError: the driver refuses the array.
        """
        argument = next(argument for argument in self._arguments if argument["name"] == name)
        element, box = argument["element"], argument["box"]
        item = _ITEM_BYTES[element]
        rank = len(shape)
        tensor_map = checked(
            driver.cuTensorMapEncodeTiled(
                _MAP_TYPES[element],
                rank,
                address,
                [driver.cuuint64_t(size) for size in reversed(shape)],
                [driver.cuuint64_t(stride * item) for stride in reversed(strides[:-1])],
                [driver.cuuint32_t(size) for size in reversed(box)],
                [driver.cuuint32_t(1)] * rank,
                driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
                _SWIZZLES[argument["swizzle"]],
                driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        )
        return (ctypes.string_at(tensor_map.getPtr(), 128), *shape, *strides)

    def close(self) -> None:
        driver.cuModuleUnload(self._module)


class KernelLibrary:
    """The kernels compiled for a device; each is loaded when it is first asked for.

    Attributes:
        architecture: compute capability of the machine code, times ten.
    """

    def __init__(self, device: CudaDevice, folder: Path | None = None) -> None:
        """
        Args:
            folder: what ``python -m engine_runtime.kernels.compile`` wrote; None: where it writes by itself.

        Raises:
            KernelsMissingError: nothing there runs on the device.
        """
        root = folder or CUBINS
        self._max_shared_memory = device.properties.max_shared_memory_per_block
        self.architecture, self._folder = _find(root, device.properties.compute_capability)
        manifest = json.loads((self._folder / MANIFEST).read_text())
        if manifest["version"] != MANIFEST_VERSION:
            raise KernelsMissingError(
                f"{self._folder} was written by another version; run make kernels, or install inflightd again"
            )
        self._entries: dict[str, dict[str, Any]] = manifest["kernels"]
        self._names = tuple(
            name for name, entry in self._entries.items() if entry["shared_memory"] <= self._max_shared_memory
        )
        self._kernels: dict[str, Kernel] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def names(self) -> tuple[str, ...]:
        """Of the kernels that need no more shared memory than the GPU has."""
        return self._names

    def get(self, name: str) -> Kernel:
        """
        Raises:
            KernelsMissingError: no such kernel, or its file is gone.
            CudaError: the driver does not take it.
        """
        kernel = self._kernels.get(name)
        if kernel is None:
            if name not in self._entries:
                raise KernelsMissingError(f"there is no kernel {name} for compute capability {self._version}")
            try:
                code = (self._folder / f"{name}.cubin").read_bytes()
            except OSError as error:
                raise KernelsMissingError(f"kernel {name}: {error}; run make kernels") from error
            kernel = Kernel(name, self._entries[name], code, self._max_shared_memory)
            self._kernels[name] = kernel
        return kernel

    @property
    def _version(self) -> str:
        return f"{self.architecture // 10}.{self.architecture % 10}"

    def close(self) -> None:
        """Unloads everything; no kernel may be running."""
        for kernel in self._kernels.values():
            kernel.close()
        self._kernels.clear()


def _early_launch(num_threads: int, shared_memory: int) -> driver.CUlaunchConfig:
    """A launch that may begin before the one before it has ended."""
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    early = driver.CUlaunchConfig()
    early.blockDimX, early.blockDimY, early.blockDimZ = num_threads, 1, 1
    early.sharedMemBytes = shared_memory
    early.attrs = [attribute]
    early.numAttrs = 1
    return early


def _format_of(kind: str) -> str:
    if kind == "tensor_map":
        return "128s"
    return "Q" if kind.startswith("*") else _FORMATS[kind]


def _find(root: Path, capability: tuple[int, int]) -> tuple[int, Path]:
    """The best folder for a device: of its own capability, or of a lower one of generation 8.

    From 9.0 on, machine code uses instructions of one capability only and runs on no other.
    """
    major, minor = capability
    candidates = range(minor, -1, -1) if major == 8 else [minor]
    for candidate in candidates:
        architecture = 10 * major + candidate
        folder = root / f"sm_{architecture}"
        if (folder / MANIFEST).is_file():
            return architecture, folder
    present = sorted(path.name for path in root.glob("sm_*")) if root.is_dir() else []
    raise KernelsMissingError(
        f"no kernels for a GPU of compute capability {major}.{minor} in {root} "
        f"(there: {', '.join(present) or 'nothing'}); run make kernels, or install a released wheel"
    )
