"""The executor for NVIDIA GPUs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from engine_runtime.cuda import CudaDevice, CudaError, Event, PinnedBuffer, Stream
from engine_runtime.executors.sequence_table import Share
from engine_runtime.executors.tensorrt.background_builds import BackgroundBuilds
from engine_runtime.executors.tensorrt.batch import ArrangedRun, DeviceBatch, StepInputs
from engine_runtime.executors.tensorrt.decoder import DeviceDecoder
from engine_runtime.kernels.gpu_sampling import GpuSampler
from engine_runtime.kernels.sampling_rows import PackedRows, SamplingPath, has_penalties
from scheduler.executor import ExecutorLostError, OutOfDeviceMemoryError
from scheduler.messages import (
    ExecutorSpec,
    ModelRunnerOutput,
    SampledToken,
    SchedulerOutput,
    TokenLogprobs,
)

_logger = logging.getLogger(__name__)
MAX_IN_FLIGHT = 2

Reports = dict[str, tuple[TokenLogprobs, ...]]


class PendingStep(Future[ModelRunnerOutput]):
    """A step on the device. Whoever asks for the result waits for the device and reads it."""

    def __init__(self, collect: Callable[[], ModelRunnerOutput]) -> None:
        super().__init__()
        self._collect = collect

    def result(self, timeout: float | None = None) -> ModelRunnerOutput:
        self._finish()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._finish()
        return super().exception(timeout)

    def _finish(self) -> None:
        if not self.done():
            try:
                self.set_result(self._collect())
            except Exception as error:
                self.set_exception(error)


class TensorRTExecutor:
    """Enqueues each step and returns; a sampled token goes to the next step without the host.

    All calls come from the thread that opened the device. Pinned memory is reused every second step, which is
    safe because the result of a step is asked for before the next but one is handed over.
    """

    def __init__(
        self,
        spec: ExecutorSpec,
        device: CudaDevice,
        stream: Stream,
        decoder: DeviceDecoder,
        batch: DeviceBatch,
        inputs: StepInputs,
        sampler: GpuSampler,
        builds: BackgroundBuilds,
    ) -> None:
        self._spec = spec
        self._device = device
        self._stream = stream
        self._decoder = decoder
        self._batch = batch
        self._inputs = inputs
        self._sampler = sampler
        self._builds = builds
        # What is sampled comes first, then the sums of hidden states. One a step in flight, and the last for
        # runs that the host waits for at once.
        self._sums_at = sampler.output_bytes(SamplingPath.FULL)
        self._outputs = [
            (PinnedBuffer(self._sums_at + inputs.most_pieces * 4 * spec.embedding_size), Event())
            for _ in range(MAX_IN_FLIGHT + 1)
        ]
        self._turn = 0
        self._refused: set[str] = set()

    @property
    def spec(self) -> ExecutorSpec:
        return self._spec

    @property
    def max_in_flight(self) -> int:
        return MAX_IN_FLIGHT

    def execute(self, step: SchedulerOutput) -> Future[ModelRunnerOutput]:
        """Enqueues a step. The future's ``result`` waits for it."""
        try:
            collect = self._enqueue(step)
        except Exception as error:
            failed: Future[ModelRunnerOutput] = Future()
            failed.set_exception(self._after(error))
            return failed
        return PendingStep(collect)

    def shutdown(self) -> None:
        self._builds.close()
        try:
            self._stream.synchronize()
        except CudaError as error:  # the device is lost; what follows fails without harm
            _logger.warning("at the end: %s", error)
        self._decoder.close()
        self._sampler.close()
        self._inputs.free()
        for buffer, event in self._outputs:
            buffer.free()
            event.close()
        self._stream.close()
        self._device.close()

    def _after(self, error: Exception) -> Exception:
        """Waits for what a failed step has enqueued: nobody else does before its pinned memory is reused."""
        found = _lost(error)
        if not isinstance(found, ExecutorLostError):
            try:
                self._stream.synchronize()
            except CudaError as later:
                return _lost(later)
        return found

    def _enqueue(self, step: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        shares = self._batch.apply(step)
        self._refused.difference_update(step.released)
        for new in step.new:
            self._admit(new.request_id)
        # A share may lie past the known tokens if the step that should have sampled them failed.
        runnable = [
            share
            for share in shares
            if share.stop <= len(share.state.token_ids) and share.state.request_id not in self._refused
        ]
        masks = {} if step.masks is None else self._sampler.upload_masks(self._stream, step.masks)
        reports: Reports = {}
        sampled: dict[str, SampledToken] = {}
        *first_runs, last_run = list(self._batch.runs(runnable)) or [[]]
        for run in first_runs:  # rare: log-probabilities of a long prompt
            sampled |= self._start(run, masks, MAX_IN_FLIGHT)(reports)
        self._turn = (self._turn + 1) % MAX_IN_FLIGHT
        collect = self._start(last_run, masks, self._turn) if last_run else None
        pools = self._batch.take_pools(runnable)

        def finish() -> ModelRunnerOutput:
            if collect is not None:
                sampled.update(collect(reports))
            for request_id, pool in pools.items():
                sampled[request_id] = replace(sampled[request_id], embedding=pool.vector())
            tokens = [
                sampled.get(share.state.request_id)
                or SampledToken(share.state.request_id, 0, None, is_valid=False)
                for share in shares
                if share.samples
            ]
            return ModelRunnerOutput(step.step_id, tuple(tokens), tuple(reports.items()))

        return finish

    def _admit(self, request_id: str) -> None:
        """Tells the sampler about a new sequence; one that it cannot serve fails alone."""
        state = self._batch.states[request_id]
        try:
            self._sampler.admit(
                self._stream,
                self._batch.slot(state),
                state.params,
                state.token_ids.view.tolist() if has_penalties(state.params) else (),
                state.num_prompt_tokens,
            )
        except (ValueError, CudaError) as error:
            if isinstance(error, CudaError) and error.is_fatal:
                raise
            self._refused.add(request_id)

    def _start(
        self, run: Sequence[Share], masks: Mapping[str, int], output_index: int
    ) -> Callable[[Reports], dict[str, SampledToken]]:
        """Enqueues a run; returns what waits for its results.

        Args:
            masks: device addresses, by request id.
        """
        self._inputs.turn()
        arranged = self._batch.arrange(run)
        shape = arranged.shape
        packed = self._sampler.pack(
            self._inputs.sampling,
            arranged.slots,
            arranged.positions,
            grammars=[masks.get(s.state.request_id, 0) for s in arranged.sampling] if masks else None,
            targets=arranged.targets,
            num_rows=shape.num_rows,
        )
        self._inputs.copy(self._stream, arranged.num_sequences, arranged.num_blocks)
        self._decoder.run(shape, packed.path)
        output, event = self._outputs[output_index]
        self._stream.copy_to_host(
            output.address, self._sampler.output_address, self._sampler.output_bytes(packed.path)
        )
        if shape.num_pieces:
            num_bytes = shape.num_pieces * 4 * self._spec.embedding_size
            self._stream.copy_to_host(output.address + self._sums_at, self._decoder.sums_address, num_bytes)
        event.record(self._stream)
        for share in arranged.sampling:
            share.state.token_ids.extend((-1 - self._batch.slot(share.state),))

        def collect(reports: Reports) -> dict[str, SampledToken]:
            try:
                event.synchronize()
            except CudaError as error:
                raise _lost(error) from error
            return self._collect(output, packed, arranged, reports)

        return collect

    def _collect(
        self, output: PinnedBuffer, packed: PackedRows, arranged: ArrangedRun, reports: Reports
    ) -> dict[str, SampledToken]:
        request_ids = [share.state.request_id for share in arranged.sampling]
        tokens, found = self._sampler.collect(output.array, packed, request_ids)
        first = 0
        for share in arranged.prompt_shares:
            request_id = share.state.request_id
            last = first + share.num_prompt_rows
            reports[request_id] = reports.get(request_id, ()) + tuple(found[first:last])
            first = last
        if arranged.pieces:
            sums = output.array[self._sums_at :].view(np.float32).reshape(-1, self._spec.embedding_size)
            for piece, total in zip(arranged.pieces, sums, strict=False):
                piece.pool.add_sum(total, piece.num_rows)
        return {token.request_id: token for token in tokens}


def _lost(error: Exception) -> Exception:
    """What ends the process if the device is of no use any more, what says that it is full, or the error."""
    if isinstance(error, CudaError) and error.is_fatal:
        return ExecutorLostError(f"the GPU is lost: {error}")
    if isinstance(error, CudaError) and error.name == "CUDA_ERROR_OUT_OF_MEMORY":
        return OutOfDeviceMemoryError(str(error))
    return error
