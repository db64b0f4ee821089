"""The outputs of one request on their way to whoever reads them."""

from __future__ import annotations

import asyncio
import dataclasses

from scheduler.messages import EngineOutput, Request
from server.errors import ApiError


class OutputStream:
    """Outputs of one request on their way to its consumer. Those that pile up are handed over as one.

    Attributes:
        is_submitted: whether the engine that runs now has the request, which has not ended.
        has_ended: whether the last output has come.
        num_deaths: engines that died with it.
    """

    __slots__ = ("_failure", "_num_cached_tokens", "_pending", "_request", "_token_ids", "_waiter",
                 "has_ended", "is_submitted", "num_deaths")  # fmt: skip

    def __init__(self, request: Request) -> None:
        self._request = request
        self._token_ids: list[int] = []
        self._num_cached_tokens: int | None = None
        self._pending: list[EngineOutput] = []
        self._failure: ApiError | None = None
        # One consumer, woken once: an Event does more for each token.
        self._waiter: asyncio.Future[None] | None = None
        self.is_submitted = True
        self.has_ended = False
        self.num_deaths = 0

    def put(self, output: EngineOutput) -> None:
        if output.token_ids and self._num_cached_tokens is None:
            self._num_cached_tokens = output.num_cached_tokens
        if self.num_deaths:  # what a later engine finds in its cache is not what the client's prompt found
            output = dataclasses.replace(output, num_cached_tokens=self._num_cached_tokens or 0)
        self._token_ids += output.token_ids
        self._pending.append(output)
        if output.finish_reason is not None:
            self.is_submitted = False
            self.has_ended = True
        self._wake()

    @property
    def has_failed(self) -> bool:
        return self._failure is not None

    def fail(self, error: ApiError) -> None:
        """Nothing comes any more."""
        self._failure = error
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def remaining_request(self) -> Request:
        """What another engine has to do."""
        known = self._request.generated_token_ids  # another server's engine generated them
        return dataclasses.replace(self._request, generated_token_ids=(*known, *self._token_ids))

    async def get(self) -> EngineOutput:
        """Raises the failure of the stream once what came before it is handed over."""
        if not self._pending and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        pending, self._pending = self._pending, []
        if not pending:
            assert self._failure is not None
            raise self._failure
        return pending[0] if len(pending) == 1 else _joined(pending)


def _joined(outputs: list[EngineOutput]) -> EngineOutput:
    first, last = outputs[0], outputs[-1]
    logprobs = [record for output in outputs for record in output.logprobs or ()]
    prompt_logprobs = next((o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None), None)
    return EngineOutput(
        request_id=first.request_id,
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        logprobs=tuple(logprobs) if any(o.logprobs is not None for o in outputs) else None,
        prompt_logprobs=prompt_logprobs,
        embedding=next((o.embedding for o in outputs if o.embedding is not None), None),
        finish_reason=last.finish_reason,
        num_cached_tokens=first.num_cached_tokens,
        first_scheduled_time=first.first_scheduled_time,
        error=last.error,
    )
