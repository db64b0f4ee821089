"""Work that is recorded once and then launched whole, which costs the CPU a few microseconds."""

from __future__ import annotations

from collections.abc import Callable

from cuda.bindings import driver

from engine_runtime.cuda import Stream, checked


class CudaGraph:
    """What a function enqueues, with all its addresses and sizes; only the contents of memory may change."""

    def __init__(self, stream: Stream, enqueue: Callable[[], None]) -> None:
        """Calls ``enqueue`` once, which runs nothing.

        Args:
            stream: what ``enqueue`` uses.

        Raises:
            CudaError: something in it cannot be recorded.
        """
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        checked(driver.cuStreamBeginCapture(stream.handle, mode))
        try:
            enqueue()
        except BaseException:
            code, graph = driver.cuStreamEndCapture(stream.handle)
            if code == driver.CUresult.CUDA_SUCCESS:  # it fails if the capture is broken already
                driver.cuGraphDestroy(graph)
            raise
        graph = checked(driver.cuStreamEndCapture(stream.handle))
        try:
            self._executable = checked(driver.cuGraphInstantiate(graph, 0))
        finally:
            driver.cuGraphDestroy(graph)

    def launch(self, stream: Stream) -> None:
        """Enqueues everything."""
        checked(driver.cuGraphLaunch(self._executable, stream.handle))

    def close(self) -> None:
        """Frees the graph; it may not be running."""
        driver.cuGraphExecDestroy(self._executable)
