"""The executor for CPUs: the decoder's graph in ONNX Runtime, attention and sampling in numba."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from engine_runtime.executors.onnxruntime.decoder_session import DecoderSession
from engine_runtime.executors.onnxruntime.embedding import EmbeddingTable
from engine_runtime.executors.onnxruntime.input_batch import InputBatch
from engine_runtime.executors.sequence_table import Share, mask_rows
from engine_runtime.kernels.numpy_types import Float32Array, Int32Array
from engine_runtime.sampling import Sampler, SamplingRow
from scheduler.messages import (
    ExecutorSpec,
    ModelRunnerOutput,
    SampledToken,
    SchedulerOutput,
    TokenLogprobs,
)


class OnnxRuntimeExecutor:
    """Runs each step at once, in the thread that hands it over, with the session's threads helping."""

    def __init__(
        self,
        spec: ExecutorSpec,
        session: DecoderSession,
        embedding: EmbeddingTable,
        *,
        max_rows: int,
    ) -> None:
        """
        Args:
            max_rows: rows of logits that ``session`` computes in one run.
        """
        self._spec = spec
        self._session = session
        self._embedding = embedding
        self._batch = InputBatch(
            spec.max_num_seqs,
            spec.max_num_batched_tokens,
            max_rows,
            -(-spec.max_model_len // spec.block_size),
        )
        self._sampler = Sampler(spec.vocab_size)

    @property
    def spec(self) -> ExecutorSpec:
        return self._spec

    @property
    def max_in_flight(self) -> int:
        return 1

    def execute(self, step: SchedulerOutput) -> Future[ModelRunnerOutput]:
        """Runs a step; the future is done when this returns."""
        future: Future[ModelRunnerOutput] = Future()
        try:
            future.set_result(self._execute(step))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self) -> None:
        self._session.close()
        self._batch.states.clear()

    def _execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        sampled: list[SampledToken] = []
        prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]] = {}
        shares = self._batch.apply(step)
        masks = mask_rows(step.masks)
        for run in self._batch.runs(shares):
            logits = self._compute(run)
            self._pool(run)
            wants_prompt = any(share.num_prompt_rows for share in run)
            if wants_prompt:
                logits = self._report_prompts(run, logits, prompt_logprobs)
            sampled += self._sample([share for share in run if share.samples], logits, masks)
        for index, token in enumerate(sampled):
            state = self._batch.states[token.request_id]
            state.token_ids.extend((token.token_id,))
            if state.pool is not None:
                sampled[index] = replace(token, embedding=state.pool.vector())
                state.pool = None
        return ModelRunnerOutput(step.step_id, tuple(sampled), tuple(prompt_logprobs.items()))

    def _compute(self, run: list[Share]) -> Float32Array:
        """Logits [R, V] of the rows that ``run`` asks for."""
        token_ids, layout, rows = self._batch.arrange(run)
        self._embedding.look_up(token_ids, self._session.hidden)
        self._session.record.fill(layout, len(rows))
        self._session.run(rows.astype(np.int64))
        return self._session.logits[: len(rows)]

    def _pool(self, run: list[Share]) -> None:
        """Hands the final hidden states to the sequences that want them; all their rows are the prompt's."""
        row = 0
        for share in run:
            if share.state.pool is not None and share.num_rows:
                share.state.pool.add(self._session.final_hidden(row, row + share.num_rows))
            row += share.num_rows

    def _report_prompts(
        self, run: list[Share], logits: Float32Array, reports: dict[str, tuple[TokenLogprobs, ...]]
    ) -> Float32Array:
        """Adds the log-probabilities of prompt tokens to ``reports``; returns the rows to sample from."""
        kept: list[int] = []
        row = 0
        for share in run:
            state, count = share.state, share.num_prompt_rows
            if count and state.params.prompt_logprobs is not None:
                targets = state.token_ids.view[share.start + 1 : share.start + 1 + count]
                top = state.params.prompt_logprobs
                found = self._sampler.prompt_logprobs(logits[row : row + count], targets, top)
                reports[state.request_id] = reports.get(state.request_id, ()) + found
            row += count
            if share.samples:
                kept.append(row)
                row += 1
        return logits[kept]

    def _sample(
        self, shares: list[Share], logits: Float32Array, masks: dict[str, Int32Array]
    ) -> list[SampledToken]:
        if not shares:
            return []
        rows = [
            SamplingRow(
                share.state.request_id,
                share.state.params,
                share.state.token_ids.view,
                share.state.num_prompt_tokens,
                masks.get(share.state.request_id),
            )
            for share in shares
        ]
        return self._sampler.sample(logits, rows)
