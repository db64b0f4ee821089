"""The API process' own parts (validation, tokenizer, admission, detokenizer) and its engine, without HTTP."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import shlex
import threading
from collections.abc import AsyncGenerator, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from server.answer import Usage
from server.app import create_app
from server.choice import Choice
from server.config import ServerConfig
from server.config_sources import ConfigError, add_arguments, config_from
from server.engine_client import ZmqEngineClient
from server.errors import EngineDeadError, InvalidRequestError, UnsupportedParameterError
from server.logs import configure_logging
from server.model_source import find_model
from server.parsing.deltas import ContentDelta
from server.service import Service
from server.tokenizer import load_tokenizer

T = TypeVar("T")

_LAST_ANSWERS_S = 2.0
# Of the body; each would ask for more than one text.
_NOT_HERE = ("n", "best_of", "logprobs", "prompt_logprobs", "echo", "tools", "stream", "stream_options")


class StartError(Exception):
    """The engine cannot be started; the message says why."""


@dataclass(frozen=True, slots=True)
class Ending:
    """What is known at the end of a text."""

    finish_reason: str
    num_prompt_tokens: int
    num_tokens: int


class TextService:
    """Runs an event loop in a thread of its own, with everything that answers requests on it."""

    def __init__(self, arguments: str) -> None:
        """
        Args:
            arguments: of ``inflightd serve``, as on a command line.

        Raises:
            ConfigError, ModelSourceError: they are wrong.
        """
        config = _config_of(arguments)
        self._source = find_model(config.model)
        names = config.served_model_name or (self._source.name,)
        self._config = dataclasses.replace(config, served_model_name=names)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="inflightd", daemon=True)
        self._service: Service | None = None
        self._engine: ZmqEngineClient | None = None

    def start(self) -> None:
        """Returns when the engine takes requests. Raises StartError; nothing is left running then."""
        configure_logging(self._config.log_level, self._config.log_format)
        self._thread.start()
        try:
            self.submit(self._start()).result()
        except BaseException:
            self.stop()
            raise

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Has the loop run something."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def stop(self) -> None:
        """Ends the engine; what still runs gets an error."""
        self.submit(self._stop()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def answer(self, fields: dict[str, Any]) -> AsyncGenerator[str | Ending, None]:
        """Pieces of the text, then its ending. Closing the generator aborts the request in the engine.

        Args:
            fields: a body of ``/v1/chat/completions`` if it has ``messages``, else of ``/v1/completions``.

        Raises:
            ApiError: the request is wrong, or failed.
        """
        service = self._service
        assert service is not None
        for name in _NOT_HERE:
            if name in fields:
                raise UnsupportedParameterError(f"'{name}' is not supported here.", param=name)
        if ("messages" in fields) == ("prompt" in fields):
            raise InvalidRequestError("Give either 'text_input' or 'messages'.", param="text_input")
        if not service.engine.is_ready:
            raise EngineDeadError("the engine is not ready")
        service.admission.check()
        validate = service.validator.chat if "messages" in fields else service.validator.completion
        call = await validate(fields, len(json.dumps(fields)))
        if len(call.requests) != 1:
            raise UnsupportedParameterError("'prompt' must be one text here.", param="prompt")
        form = _TextForm()
        async with aclosing(service.answer_to(call, form).events()) as pieces:
            async for piece in pieces:
                yield piece.decode()
        yield Ending(form.finish_reason, form.num_prompt_tokens, form.num_tokens)

    async def _start(self) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()

        def fail(reason: str) -> None:
            if not ready.done():
                ready.set_exception(StartError(reason))

        def succeed(_: object) -> None:
            if not ready.done():
                ready.set_result(None)

        self._engine = ZmqEngineClient(
            self._config, str(self._source.path), on_ready=succeed, on_failure=fail
        )
        self._engine.start()
        tokenizer = await self._loop.run_in_executor(None, load_tokenizer, self._source.path)
        self._engine.provide(tokenizer.vocabulary)
        service = create_app(self._config, self._engine, tokenizer).state.service
        assert isinstance(service, Service)
        self._service = service
        await ready

    async def _stop(self) -> None:
        if self._service is not None:
            await self._service.close()
        if self._engine is not None:
            await self._engine.stop()
        # Requests learn that the engine is gone.
        running = asyncio.all_tasks() - {asyncio.current_task()}
        if running:
            await asyncio.wait(running, timeout=_LAST_ANSWERS_S)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


class _Parser(argparse.ArgumentParser):
    """Raises where a command would end with its usage: this process is Triton's."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _config_of(arguments: str) -> ServerConfig:
    parser = _Parser(add_help=False)
    add_arguments(parser)
    try:
        words = shlex.split(arguments)
    except ValueError as error:
        raise ConfigError(f"the arguments cannot be read: {error}") from None
    return config_from(parser.parse_args(words))


class _TextForm:
    """Text as it is, in UTF-8: no objects around it. Reasoning is left out."""

    def __init__(self) -> None:
        self.finish_reason = ""
        self.num_prompt_tokens = self.num_tokens = 0

    def first(self, choice: Choice) -> bytes:
        return b""

    def piece(self, choice: Choice, text: str) -> bytes:
        deltas = choice.take_piece(text)
        return "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta)).encode()

    def last(self, choice: Choice) -> bytes:
        self.finish_reason = choice.finish_reason or ""
        deltas = choice.take_deltas()
        return "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta)).encode()

    def end(self, usage: Usage) -> bytes:
        self.num_prompt_tokens, self.num_tokens = usage.prompt_tokens, usage.completion_tokens
        return b""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        raise NotImplementedError("texts come in pieces")
