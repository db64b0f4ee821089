"""What becomes of a recording that fails."""

from __future__ import annotations

import pytest

from tests.gpu.gpu_found import skip_without_gpu

pytestmark = skip_without_gpu


def test_a_recording_that_fails_harms_nothing_else() -> None:
    from engine_runtime.cuda import CudaDevice, CudaError, DeviceBuffer, PinnedBuffer, Stream
    from engine_runtime.executors.tensorrt.cuda_graphs import CudaGraph

    device = CudaDevice()
    stream, memory, found = Stream(), DeviceBuffer(8), PinnedBuffer(8)

    def fill_and_wait() -> None:
        stream.fill(memory.address, 1, 8)
        stream.synchronize()  # which nobody can record

    with pytest.raises(CudaError, match="CAPTURE") as caught:
        CudaGraph(stream, fill_and_wait)
    assert not caught.value.is_fatal
    graph = CudaGraph(stream, lambda: stream.fill(memory.address, 7, 8))
    for byte in (2, 3):
        stream.fill(memory.address, byte, 8)
        graph.launch(stream)
        stream.copy_to_host(found.address, memory.address, 8)
        stream.synchronize()
        assert found.array.tolist() == [7] * 8
    graph.close()
    for resource in (memory, found):
        resource.free()
    stream.close()
    device.close()
