"""Runs a call: from the engine's outputs to the bytes of the response."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from scheduler.messages import FinishReason
from server.admission import Admission
from server.api_keys import cache_scope
from server.beam_streams import BeamStreams
from server.call import Call
from server.choice import Choice
from server.detokenizer import IncrementalDetokenizer
from server.engine_protocol import EngineClient
from server.engine_streams import EngineStreams, OutputStreams
from server.metrics import Metrics, RequestTimer
from server.parsing.output_parser import OutputParser
from server.request_trace import request_trace
from server.resume import ResumeMarks
from server.running_calls import RunningCalls
from server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Usage:
    """What a call cost, in tokens. A prompt counts once, however many choices answer it.

    Attributes:
        reasoning_tokens: None if the model does not think aloud.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int | None = None

    def as_json(self) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.reasoning_tokens is not None:
            shown["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return shown


def usage_so_far(call: Call, choice: Choice) -> Usage:
    """What one choice of a call has cost up to now."""
    return Usage(
        prompt_tokens=len(call.prompt_of(choice.index).token_ids),
        completion_tokens=choice.num_tokens,
        cached_tokens=choice.num_cached_tokens,
    )


class AnswerForm(Protocol):
    """How an endpoint writes an answer. The methods but the last return whole events of a stream, or none."""

    def first(self, choice: Choice) -> bytes:
        """Before the first text of a choice."""
        ...

    def piece(self, choice: Choice, text: str) -> bytes:
        """The next text of a choice, and its logprobs if they are wanted."""
        ...

    def last(self, choice: Choice) -> bytes:
        """After the last text of a choice, with its finish reason."""
        ...

    def end(self, usage: Usage) -> bytes:
        """After the last choice: what tells the client that the stream is whole."""
        ...

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The body of a response that is no stream."""
        ...


class Answer:
    """The answer to one call. Either ``events`` or ``whole`` is used, once.

    Closing or cancelling either aborts in the engine what has not finished.
    """

    def __init__(
        self,
        call: Call,
        engine: EngineClient,
        admission: Admission,
        tokenizer: Tokenizer,
        metrics: Metrics,
        running: RunningCalls,
        form: AnswerForm,
    ) -> None:
        call = call.scoped(cache_scope.get())
        self._call = call
        self._form = form
        syntax = call.syntax
        # Control tokens that set off calls and reasoning are for the parser, which takes them out.
        shown = frozenset[int]() if syntax is None else tokenizer.control_token_ids(syntax.markers)
        self._admission = admission
        self._running = running
        self._streams = _streams(call, engine, admission)
        self._choices = [
            Choice(
                index,
                request,
                IncrementalDetokenizer(
                    tokenizer,
                    # The text of a completion goes on where its prompt ends; a chat's begins anew.
                    request.prompt_token_ids if call.continues_prompt else (),
                    skip_special_tokens=call.skip_special_tokens,
                    shown=shown,
                    stop=call.stop,
                    include_stop=call.include_stop,
                ),
                RequestTimer(metrics, request),
                None if syntax is None else OutputParser(syntax),
                keeps_token_ids=call.shows_token_ids,
            )
            for index, request in enumerate(call.requests)
        ]
        self._marks = ResumeMarks(call) if call.is_resumable else None
        metrics.params_n.observe(call.n)
        if (trace := request_trace.get()) is not None:
            trace.describe(call)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Chunks of events, to the end. What arrives together goes out together. Raises ApiError."""
        form, marks = self._form, self._marks
        has_begun = [False] * len(self._choices)
        if self._call.requests[0].generated_token_ids:
            self._replay()
            has_begun[0] = True
        rest = b""
        async with aclosing(self._texts()) as texts:
            async for batch in texts:
                chunk = b""
                for choice, text, is_last in batch:
                    if not has_begun[choice.index]:
                        has_begun[choice.index] = True
                        chunk += form.first(choice)
                    if text:
                        chunk += form.piece(choice, text)
                    if is_last:
                        chunk += form.last(choice)
                if marks is not None and is_last:
                    rest = chunk  # no mark could tell whether the end has been sent, so it goes with it
                    continue
                if chunk:
                    yield chunk if marks is None else chunk + marks.take(choice.num_cached_tokens)
        if rest := rest + form.end(self._usage()):
            yield rest

    def _replay(self) -> None:
        """Brings the one choice to where another server stopped; what it had said is not said again."""
        (choice,) = self._choices
        if text := choice.replay(self._call.num_cached_tokens):
            self._form.piece(choice, text)

    async def whole(self) -> bytes:
        """The body of the response. Raises ApiError."""
        async with aclosing(self._texts()) as texts:
            async for _ in texts:
                pass
        return self._form.whole(self._best_choices(), self._usage())

    async def _texts(self) -> AsyncGenerator[list[tuple[Choice, str, bool]], None]:
        """(choice, new text, whether it is complete now) for what the engine has worked on, until all are."""
        choices, is_scoring = self._choices, self._call.is_scoring
        running = set(range(len(choices)))
        reason_of_unfinished = FinishReason.ABORT
        with self._admission.admit(self._call.requests), self._running.entered(self._call, choices):
            try:
                async with aclosing(self._streams.batches()) as batches:
                    async for batch in batches:
                        now = time.monotonic()
                        texts = []
                        for index, output in batch:
                            if index not in running:
                                continue  # came after a stop string
                            choice = choices[index]
                            text = choice.push(output, now)
                            if self._marks is not None:
                                self._marks.add(output.token_ids)
                            if is_scoring:
                                text = ""
                                choice.forget_generated()
                            is_last = choice.finish_reason is not None
                            texts.append((choice, text, is_last))
                            if is_last:
                                running.discard(index)
                                self._streams.close(index)
                        yield texts
                        if not running:
                            return
            except Exception:
                reason_of_unfinished = FinishReason.ERROR
                raise
            finally:
                for choice in choices:
                    choice.abandon(reason_of_unfinished, time.monotonic())

    def _best_choices(self) -> list[Choice]:
        """Those that are shown; of more, each prompt's best first, which is how a beam search gives them."""
        call = self._call
        if call.best_of == call.n:
            return self._choices
        best: list[Choice] = []
        for first in range(0, len(self._choices), call.best_of):
            candidates = self._choices[first : first + call.best_of]
            if call.length_penalty is None:
                candidates = sorted(candidates, key=lambda choice: choice.logprob, reverse=True)
            best += candidates[: call.n]
        for index, choice in enumerate(best):
            choice.index = index
        return best

    def _usage(self) -> Usage:
        first_choices = self._choices[:: self._call.best_of]
        return Usage(
            prompt_tokens=sum(len(prompt.token_ids) for prompt in self._call.prompts),
            completion_tokens=sum(choice.num_tokens for choice in self._choices),
            cached_tokens=sum(choice.num_cached_tokens for choice in first_choices),
            reasoning_tokens=(
                None
                if self._call.syntax is None or self._call.syntax.reasoning is None
                else sum(choice.num_reasoning_tokens for choice in self._choices)
            ),
        )


def _streams(call: Call, engine: EngineClient, admission: Admission) -> OutputStreams:
    if call.length_penalty is None:
        return EngineStreams(engine, admission, call.requests)
    return BeamStreams(engine, admission, call.requests, call.best_of, call.length_penalty)
