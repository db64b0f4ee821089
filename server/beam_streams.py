"""Runs beam searches on the engine, one for each prompt of a call."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from scheduler.messages import EngineOutput, FinishReason, Request, SamplingParams
from server.admission import Admission
from server.beam_search import Beam, BeamSearch
from server.engine_protocol import EngineClient
from server.engine_streams import Batch
from server.errors import InternalError

_log = logging.getLogger(__name__)

_Jobs = asyncio.Queue[tuple[Beam, asyncio.Future[EngineOutput]]]


class BeamStreams:
    """Answers ``width`` requests a prompt with the best texts that a beam search finds, best first.

    Each beam of each step is a request of one token to the engine: what the beams have in common is in the
    prefix cache, all but the tokens of the last block. The requests of the call give the searches their
    places in line: as many beams are worked on at a time as have their turn, so one suffices to get on.
    """

    def __init__(
        self,
        engine: EngineClient,
        admission: Admission,
        requests: Sequence[Request],
        width: int,
        length_penalty: float,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._requests = requests
        self._width = width
        self._length_penalty = length_penalty

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """(index of the request, whole answer) pairs, those of a prompt together. Closing the generator
        aborts what runs.

        Raises:
            EngineDeadError: the engine does not take a request.
            QueueTimeoutError, DeadlineError: it took too long.
            InternalError: the engine gave up on a request.
        """
        searches = [
            asyncio.create_task(self._search(first)) for first in range(0, len(self._requests), self._width)
        ]
        for task in searches:
            task.add_done_callback(_take_failure)
        try:
            for search in asyncio.as_completed(searches):
                yield await search
        finally:
            for task in searches:
                task.cancel()

    def close(self, index: int) -> None:
        """Nothing: an answer comes whole."""

    async def _search(self, first: int) -> Batch:
        places = self._requests[first : first + self._width]
        jobs: _Jobs = asyncio.Queue()
        try:
            async with asyncio.TaskGroup() as group:
                workers = [group.create_task(self._work(place, jobs)) for place in places]
                answers = await self._answers(places[0], jobs)
                for worker in workers:
                    worker.cancel()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            for place in places:
                self._admission.end(place.request_id)
        return [
            (first + rank, replace(answer, request_id=places[rank].request_id))
            for rank, answer in enumerate(answers)
        ]

    async def _answers(self, request: Request, jobs: _Jobs) -> list[EngineOutput]:
        loop = asyncio.get_running_loop()
        params = request.params
        search = BeamSearch(
            self._width,
            self._length_penalty,
            prompt_length=len(request.prompt_token_ids),
            max_tokens=params.max_tokens,
            stop_token_ids=params.stop_token_ids,
        )
        first: EngineOutput | None = None
        while search.beams:
            answers = [loop.create_future() for _ in search.beams]
            for job in zip(search.beams, answers, strict=True):
                jobs.put_nowait(job)
            outputs: list[EngineOutput] = await asyncio.gather(*answers)
            first = first or outputs[0]
            search.advance([record for output in outputs for record in output.logprobs or ()])
        assert first is not None
        return [_answer(beam, first, params.logprobs) for beam in search.best()]

    async def _work(self, place: Request, jobs: _Jobs) -> None:
        """Works on beams, one after the other, once it is the turn of ``place``."""
        await self._admission.turn(place.request_id)
        while True:
            beam, answer = await jobs.get()
            await self._admission.turn(place.request_id)  # the time may be over
            output = await self._ask(place, beam)
            if not answer.done():
                answer.set_result(output)

    async def _ask(self, place: Request, beam: Beam) -> EngineOutput:
        """What comes behind a beam, with the likeliest tokens."""
        request = replace(
            place,
            prompt_token_ids=place.prompt_token_ids + beam.token_ids,
            params=SamplingParams(
                temperature=0.0,
                logprobs=2 * self._width,
                prompt_logprobs=None if beam.token_ids else place.params.prompt_logprobs,
                max_tokens=1,
            ),
        )
        async with aclosing(self._engine.generate(request)) as outputs:
            output = await anext(outputs)
        self._admission.begin(place.request_id)
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            _log.error("request %s: %s: %s", place.request_id, output.finish_reason.value, output.error)
            raise InternalError
        return output


def _take_failure(task: asyncio.Task[Batch]) -> None:
    """When one search has failed, nobody asks for the failures of the others."""
    if not task.cancelled():
        task.exception()


def _answer(beam: Beam, first: EngineOutput, num_logprobs: int | None) -> EngineOutput:
    """A text as if one request had generated it; ``first`` is the first output for its prompt."""
    logprobs = None
    if num_logprobs is not None:
        logprobs = tuple(replace(record, top=record.top[:num_logprobs]) for record in beam.records())
    return replace(
        first,
        token_ids=beam.token_ids,
        logprobs=logprobs,
        finish_reason=FinishReason.STOP if beam.has_stopped else FinishReason.LENGTH,
    )
