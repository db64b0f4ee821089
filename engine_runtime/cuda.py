"""The few things that the runtime asks of CUDA's driver: memory, streams, events, through ``cuda-bindings``.

Calls are made by the thread that opened the device; weights are loaded and engines are built by further ones,
which make it current first. A failed call that leaves the context unusable ("poisoned") fails every later one
too; see ``CudaError.is_fatal``.

Source of the calls' meaning: the CUDA Driver API reference.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver

_PER_CALL = {
    driver.CUresult.CUDA_ERROR_INVALID_VALUE,
    driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY,
    driver.CUresult.CUDA_ERROR_NOT_FOUND,
    driver.CUresult.CUDA_ERROR_NOT_SUPPORTED,
    driver.CUresult.CUDA_ERROR_INVALID_IMAGE,
    driver.CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU,
    # What was being recorded is lost, and nothing else.
    driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
    driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
    driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNJOINED,
    driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_ISOLATION,
    driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
}

_DEFAULT_STREAM = 0


class CudaError(RuntimeError):
    """A call of the driver failed.

    Attributes:
        name: such as ``CUDA_ERROR_OUT_OF_MEMORY``.
        is_fatal: the context may be unusable, so that only a new process helps.
    """

    def __init__(self, code: Any) -> None:
        self.name = str(code.name)
        self.is_fatal = code not in _PER_CALL
        _, text = driver.cuGetErrorString(code)
        super().__init__(f"{self.name}: {text.decode() if text else 'unknown error'}")


class NoDeviceError(RuntimeError):
    """There is no NVIDIA driver or no GPU that it shows to this process."""


def checked(result: tuple[Any, ...]) -> Any:
    """What a call of the driver returned: None, one value or a tuple.

    Raises:
        CudaError: it failed.
    """
    code, *values = result
    if code != driver.CUresult.CUDA_SUCCESS:
        raise CudaError(code)
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


@dataclass(frozen=True, slots=True)
class DeviceProperties:
    """What does not change while the process runs. Sizes in bytes."""

    name: str
    compute_capability: tuple[int, int]
    num_multiprocessors: int
    total_memory: int
    l2_cache: int
    max_shared_memory_per_block: int
    driver_version: int


class CudaDevice:
    """A GPU, with its primary context current in the calling thread.

    The primary context is the one that TensorRT and cuBLAS use by themselves.
    """

    def __init__(self, ordinal: int = 0) -> None:
        """
        Raises:
            NoDeviceError: no driver, or no such GPU.
            CudaError: the GPU cannot be used.
        """
        try:
            checked(driver.cuInit(0))
            count = int(checked(driver.cuDeviceGetCount()))
        except Exception as error:  # the bindings' own class if there is no driver to load
            raise NoDeviceError(f"no usable NVIDIA driver: {error}") from error
        if ordinal >= count:
            raise NoDeviceError(f"GPU {ordinal} was asked for, and the driver shows {count}")
        self.ordinal = ordinal
        self._device = checked(driver.cuDeviceGet(ordinal))
        self._context = checked(driver.cuDevicePrimaryCtxRetain(self._device))
        try:
            self.make_current()
            self.properties = self._read_properties()
        except BaseException:
            self.close()
            raise

    def make_current(self) -> None:
        """To be called once by each further thread that makes calls."""
        checked(driver.cuCtxSetCurrent(self._context))

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes at this moment; neighbours on the same GPU count as used."""
        free, total = checked(driver.cuMemGetInfo())
        return int(free), int(total)

    def synchronize(self) -> None:
        checked(driver.cuCtxSynchronize())

    def close(self) -> None:
        driver.cuDevicePrimaryCtxRelease(self._device)

    def _read_properties(self) -> DeviceProperties:
        kinds = driver.CUdevice_attribute

        def attribute(kind: Any) -> int:
            return int(checked(driver.cuDeviceGetAttribute(kind, self._device)))

        name = checked(driver.cuDeviceGetName(128, self._device))
        return DeviceProperties(
            name=name.split(b"\0")[0].decode(),
            compute_capability=(
                attribute(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
                attribute(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
            ),
            num_multiprocessors=attribute(kinds.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
            total_memory=int(checked(driver.cuDeviceTotalMem(self._device))),
            l2_cache=attribute(kinds.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE),
            max_shared_memory_per_block=attribute(
                kinds.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            ),
            driver_version=int(checked(driver.cuDriverGetVersion())),
        )


class DeviceBuffer:
    """Plain device memory, at least 256-byte aligned, uninitialized.

    Attributes:
        address: device pointer.
        num_bytes: as asked for.
    """

    def __init__(self, num_bytes: int) -> None:
        """
        Raises:
            CudaError: not enough memory (``is_fatal`` is False).
        """
        self.num_bytes = num_bytes
        self.address = int(checked(driver.cuMemAlloc(max(num_bytes, 1))))

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> DeviceBuffer:
        """A copy of a C-contiguous array."""
        buffer = cls(array.nbytes)
        buffer.write(array)
        return buffer

    def write(self, array: npt.NDArray[Any], offset: int = 0) -> None:
        """Copies a C-contiguous array to byte ``offset`` and waits."""
        checked(driver.cuMemcpyHtoD(self.address + offset, array.ctypes.data, array.nbytes))
        # The call returns when the array is read, and our streams do not wait for the default one.
        checked(driver.cuStreamSynchronize(_DEFAULT_STREAM))

    def read(self, array: npt.NDArray[Any], offset: int = 0) -> None:
        """Fills a C-contiguous array from byte ``offset`` and waits."""
        checked(driver.cuMemcpyDtoH(array.ctypes.data, self.address + offset, array.nbytes))

    def fill(self, byte: int) -> None:
        """Sets every byte and waits."""
        checked(driver.cuMemsetD8(self.address, byte, self.num_bytes))
        checked(driver.cuStreamSynchronize(_DEFAULT_STREAM))

    def free(self) -> None:
        """Gives the memory back; a second call does nothing."""
        if self.address:
            driver.cuMemFree(self.address)
            self.address = 0


class PinnedBuffer:
    """Page-locked host memory, which the device copies from and to without help of the CPU.

    Attributes:
        address: host pointer.
        array: uint8 view of all of it.
    """

    def __init__(self, num_bytes: int) -> None:
        """
        Raises:
            CudaError: the memory cannot be locked.
        """
        self.address = int(checked(driver.cuMemHostAlloc(max(num_bytes, 1), 0)))
        start = ctypes.cast(self.address, ctypes.POINTER(ctypes.c_uint8))
        self.array: npt.NDArray[np.uint8] = np.ctypeslib.as_array(start, (num_bytes,))

    def free(self) -> None:
        """Gives the memory back; no view of it may be used afterwards. A second call does nothing."""
        if self.address:
            driver.cuMemFreeHost(self.address)
            self.address = 0


class Stream:
    """An ordered queue of device work that does not synchronize with the default stream.

    Attributes:
        handle: ``CUstream`` as an integer, for TensorRT and kernel launches.
    """

    def __init__(self) -> None:
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self._stream = checked(driver.cuStreamCreate(flags))
        self.handle = int(self._stream)

    def copy_to_device(self, destination: int, source: int, num_bytes: int) -> None:
        """Enqueues a copy; ``source`` is pinned host memory that is not written before the copy is done."""
        checked(driver.cuMemcpyHtoDAsync(destination, source, num_bytes, self._stream))

    def copy_to_host(self, destination: int, source: int, num_bytes: int) -> None:
        """Enqueues a copy; ``destination`` is pinned host memory."""
        checked(driver.cuMemcpyDtoHAsync(destination, source, num_bytes, self._stream))

    def copy_rows_to_device(
        self, destination: int, source: int, num_rows: int, num_bytes: int, stride: int
    ) -> None:
        """Enqueues a copy of the first ``num_bytes`` of rows that are ``stride`` bytes apart on both sides.

        Args:
            source: pinned host memory.
        """
        copy = driver.CUDA_MEMCPY2D()
        copy.srcMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_HOST
        copy.srcHost = source
        copy.srcPitch = stride
        copy.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.dstDevice = destination
        copy.dstPitch = stride
        copy.WidthInBytes = num_bytes
        copy.Height = num_rows
        checked(driver.cuMemcpy2DAsync(copy, self._stream))

    def fill(self, destination: int, byte: int, num_bytes: int) -> None:
        """Enqueues setting ``num_bytes`` bytes of device memory."""
        checked(driver.cuMemsetD8Async(destination, byte, num_bytes, self._stream))

    def wait_for(self, event: Event) -> None:
        """Work enqueued later starts after ``event``."""
        checked(driver.cuStreamWaitEvent(self._stream, event.handle, 0))

    def synchronize(self) -> None:
        checked(driver.cuStreamSynchronize(self._stream))

    def close(self) -> None:
        driver.cuStreamDestroy(self._stream)


class Event:
    """A point in a stream.

    Attributes:
        handle: ``CUevent``.
    """

    def __init__(self, *, times: bool = False) -> None:
        """
        Args:
            times: whether ``milliseconds_since`` will be asked; costs a little.
        """
        flags = driver.CUevent_flags
        self.handle = checked(
            driver.cuEventCreate(flags.CU_EVENT_DEFAULT if times else flags.CU_EVENT_DISABLE_TIMING)
        )

    def record(self, stream: Stream) -> None:
        checked(driver.cuEventRecord(self.handle, stream.handle))

    def synchronize(self) -> None:
        """Waits, spinning, until the device has reached the event."""
        checked(driver.cuEventSynchronize(self.handle))

    @property
    def is_done(self) -> bool:
        """
        Raises:
            CudaError: work before the event failed.
        """
        (code,) = driver.cuEventQuery(self.handle)
        if code == driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        checked((code,))
        return True

    def milliseconds_since(self, start: Event) -> float:
        """Device time from ``start``; both were made with ``times`` and are done."""
        return float(checked(driver.cuEventElapsedTime(start.handle, self.handle)))

    def close(self) -> None:
        driver.cuEventDestroy(self.handle)
