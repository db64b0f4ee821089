"""What the routes share: one of these hangs on the application."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.admission import Admission
from server.answer import Answer, AnswerForm
from server.background_responses import BackgroundResponses
from server.call import Call
from server.config import ServerConfig
from server.engine_protocol import EngineClient
from server.errors import DrainingError, EngineDeadError
from server.grammar_check import GrammarCheck
from server.json_body import read_json_object
from server.kept_answers import KeptAnswers
from server.metric_parts import page
from server.metrics import Metrics
from server.peers import NoPeers, Peers
from server.response_store import ResponseStore
from server.resume import RESUMABLE_HEADER, can_resume
from server.running_calls import RunningCalls
from server.sse import EventStream
from server.tokenization import Tokenization
from server.tokenizer import Tokenizer
from server.validation import Validator

T = TypeVar("T")

VERSION = importlib.metadata.version("inflightd")


@dataclass
class Service:
    """The parts that answer requests, and how they work together.

    Attributes:
        is_draining: whether the server is about to end, and wants no more requests sent to it.
        takes_requests: whether new ones are taken; an operator may say no, and yes again.
    """

    config: ServerConfig
    engine: EngineClient
    admission: Admission
    tokenization: Tokenization
    metrics: Metrics
    validator: Validator
    responses: ResponseStore
    grammar_check: GrammarCheck
    background: BackgroundResponses = field(default_factory=BackgroundResponses)
    kept_answers: KeptAnswers = field(default_factory=KeptAnswers)
    peers: Peers = field(default_factory=NoPeers)
    is_draining: bool = False
    takes_requests: bool = True
    running: RunningCalls = field(init=False)
    started: int = field(default_factory=lambda: int(time.time()))
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.running = RunningCalls(self.admission)

    @property
    def is_ready(self) -> bool:
        """Whether requests should be sent here."""
        return self.takes_requests and not self.is_draining and self.engine.is_ready

    @cached_property
    def system_fingerprint(self) -> str:
        """Changes with the weights, the device and this program: then a seed may answer differently."""
        identity = f"{VERSION} {self.engine.spec.model_id} {self.engine.spec.device}"
        return "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:10]

    async def read(self, request: Request) -> tuple[dict[str, Any], int]:
        """The body of a request and its length. Raises ApiError, also if no request would be taken now."""
        if not self.takes_requests:
            raise DrainingError
        if self.engine.is_ready:  # otherwise it may not be known what it takes
            self.admission.check()
            request.state.limits = self.admission.limits()
        body, num_bytes = await read_json_object(request)
        if not self.engine.is_ready:
            raise EngineDeadError("the engine is not ready")
        return body, num_bytes

    async def metrics_page(self) -> bytes:
        """What Prometheus scrapes, over all API processes of this server."""
        parts = await self.peers.ask("metrics") if self.peers.exist else []
        return page(parts) if parts else self.metrics.text()

    async def is_running(self, response_id: str) -> bool:
        """Whether a response is worked on in the background, here or in another API process."""
        if self.background.is_running(response_id):
            return True
        return self.peers.exist and any(await self.peers.ask("is_running", response_id))

    async def cancel(self, response_id: str) -> None:
        """Ends a response in the background and waits until it is stored as such, wherever it runs."""
        if self.background.is_running(response_id) or not self.peers.exist:
            await self.background.cancel(response_id)
        else:
            await self.peers.ask("cancel", response_id)

    async def close(self) -> None:
        """Gives back what outlives a request."""
        await self.background.close()
        self.responses.close()
        self.grammar_check.close()
        self.tokenization.close()

    def answer_to(self, call: Call, form: AnswerForm) -> Answer:
        tokenizer = self.tokenization.tokenizer
        return Answer(call, self.engine, self.admission, tokenizer, self.metrics, self.running, form)

    async def answer(
        self,
        request: Request,
        validate: Callable[[dict[str, Any], int], Awaitable[Call]],
        form_of: Callable[[Call, Tokenizer, str], AnswerForm],
        *,
        can_be_resumed: bool = False,
    ) -> Response:
        """Reads and checks a request, and runs it until it is answered or its client is gone.

        Args:
            validate: from the body and its number of bytes to the call that it asks for.
            form_of: how the endpoint writes the answer.
            can_be_resumed: whether a stream may have marks, if the client asks for them.

        Raises:
            ApiError: the request is wrong, or fails before its response has begun.
        """
        call = await validate(*await self.read(request))
        if can_be_resumed and request.headers.get(RESUMABLE_HEADER) == "true" and can_resume(call):
            call = replace(call, is_resumable=True)
        form = form_of(call, self.tokenization.tokenizer, self.system_fingerprint)
        answer = self.answer_to(call, form)
        if call.is_stream:
            stream = EventStream(answer.events(), request.state.request_id)
            if call.is_resumable:
                stream.headers[RESUMABLE_HEADER] = "true"
            return stream
        whole = await while_connected(request, answer.whole())
        return Response(whole, media_type="application/json")


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits ``work``, or cancels it and raises ClientDisconnect as soon as the client is gone."""
    running = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait((running, watching), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        raise ClientDisconnect
    finally:
        running.cancel()
        watching.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def service_of(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
