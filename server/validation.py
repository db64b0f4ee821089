"""From the body of an HTTP request to what the engine takes, once. Behind this nothing can be wrong."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from scheduler.messages import Request, SamplingParams
from server.call import Call, Prompt
from server.candidate_fields import check_candidates, length_penalty, num_candidates
from server.chat_grammar import ChatGrammars
from server.chat_prompt import ChatPrompt, ChatPrompts, echoed_text
from server.chat_template import ChatTemplateError
from server.completion_prompt import CompletionPrompts
from server.context import far_too_long, max_tokens_of, prompt_limit, truncated
from server.engine_protocol import EngineClient
from server.errors import InvalidRequestError, ModelNotFoundError, excerpt
from server.field_errors import invalid_field
from server.fields import Path, check_fields
from server.json_body import OFF_LOOP_BYTES
from server.model_formats import ModelFormats, model_formats
from server.parsing.output_parser import OutputSyntax
from server.protocol import (
    MAX_PROMPTS,
    ChatCompletionRequest,
    ChatPromptFields,
    CompletionRequest,
    ModelFields,
    SamplingFields,
    StreamOptions,
)
from server.resume import resumed
from server.sampling_fields import sampling_fields
from server.structured_output import StructuredOutput
from server.tokenization import TextTooLongError, Tokenization
from server.tokenizer import InvalidTextError

W = TypeVar("W", bound=ModelFields)
S = TypeVar("S", bound=SamplingFields)

_SEED_MASK = 2**63 - 1
# What clients of TGI, which takes any name, call the one model of a server: its documentation and its client.
_ANY_MODEL = frozenset({"tgi", "dummy"})
# What OpenAI and vLLM give a text completion that does not say.
_COMPLETION_MAX_TOKENS = 16


class Validator:
    """Knows the served model, and so which calls it can answer."""

    def __init__(
        self,
        engine: EngineClient,
        tokenization: Tokenization,
        structured_output: StructuredOutput,
        served_model_names: Sequence[str],
        on_unknown_field: Callable[[Path], None],
        formats: ModelFormats | None = None,
        *,
        trusts_templates: bool = False,
    ) -> None:
        """
        Args:
            formats: of the model's answers; None finds them out from its chat template.
            trusts_templates: chat templates of requests are used.
        """
        self._engine = engine
        self._tokenization = tokenization
        self.structured_output = structured_output
        self._served_model_names = tuple(served_model_names)
        self._on_unknown_field = on_unknown_field
        if formats is None:
            formats = model_formats(tokenization.tokenizer.chat_template)
        self.chat_prompts = ChatPrompts(tokenization, formats, trusts_templates=trusts_templates)
        self._chat_grammars = ChatGrammars(tokenization.tokenizer, structured_output)
        self._completion_prompts = CompletionPrompts(engine, tokenization)

    @property
    def bounds_thinking(self) -> bool:
        """Whether the model's thoughts can be ended after some number of tokens."""
        return self._chat_grammars.can_bound(self.chat_prompts.formats.reasoning)

    async def chat(self, body: dict[str, Any], num_bytes: int) -> Call:
        """A call of ``/v1/chat/completions``. Raises ApiError."""
        arrival = time.monotonic()
        return await self.chat_of(await self._sampling(ChatCompletionRequest, body, num_bytes), arrival)

    async def chat_of(
        self,
        wire: ChatCompletionRequest,
        arrival: float,
        *,
        id_prefix: str = "chatcmpl-",
        prompt_name: str = "messages",
        limit_name: str | None = None,
    ) -> Call:
        """A call from a parsed body; ``prompt_name`` and ``limit_name`` are its fields in messages.

        Raises:
            ApiError: the model cannot answer it.
        """
        if wire.top_logprobs and not wire.logprobs:  # 0 asks for nothing; vLLM's own clients send it
            raise InvalidRequestError(
                "'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs", code="invalid_value"
            )
        spec = self._engine.spec
        if limit_name is None:
            limit_name = "max_tokens" if wire.max_completion_tokens is None else "max_completion_tokens"
        limit = wire.max_tokens if wire.max_completion_tokens is None else wire.max_completion_tokens
        chat = await self.chat_prompt(wire, prompt_limit(wire, spec), prompt_name)
        token_ids = truncated(chat.token_ids, wire, limit or 1, spec)
        max_tokens = max_tokens_of(len(token_ids), limit, None, spec, prompt_name, limit_name)
        return self._call(
            wire,
            await self._chat_grammars.grammar_of(wire, chat),
            arrival=arrival,
            id_prefix=id_prefix,
            prompts=[Prompt(token_ids, echoed_text(wire) if wire.echo else None)],
            max_tokens=[max_tokens],
            num_logprobs=(wire.top_logprobs or 0) if wire.logprobs else None,
            continues_prompt=chat.continues_message,
            syntax=chat.syntax,
        )

    async def chat_prompt(self, wire: ChatPromptFields, limit: int, prompt_name: str) -> ChatPrompt:
        """The prompt of a chat, maybe a few tokens longer than ``limit``.

        Raises:
            ApiError: there are certainly more than ``limit``, or the template refuses the chat.
        """
        try:
            return await self.chat_prompts.prompt_of(wire, limit)
        except TextTooLongError as error:
            raise far_too_long(error, self._engine.spec, prompt_name) from None
        except (ChatTemplateError, InvalidTextError) as error:
            if wire.chat_template is not None and isinstance(error, ChatTemplateError):
                prompt_name = "chat_template"
            raise InvalidRequestError(str(error), param=prompt_name, code="invalid_value") from None

    async def completion(self, body: dict[str, Any], num_bytes: int) -> Call:
        """A call of ``/v1/completions``. Raises ApiError."""
        arrival = time.monotonic()
        return await self.completion_of(await self._sampling(CompletionRequest, body, num_bytes), arrival)

    async def completion_of(
        self,
        wire: CompletionRequest,
        arrival: float,
        *,
        default_max_tokens: int = _COMPLETION_MAX_TOKENS,
        prompt_name: str = "prompt",
        limit_name: str = "max_tokens",
        grammar: str | None = None,
    ) -> Call:
        """A call from a parsed body; ``prompt_name`` and ``limit_name`` are its fields in messages.

        Args:
            grammar: one that was asked for in another way than by ``wire``, and checked.

        Raises:
            ApiError: the model cannot answer it.
        """
        echo = bool(wire.echo)
        is_scoring = wire.max_tokens == 0
        if is_scoring and not echo:
            raise InvalidRequestError(
                "Invalid 'max_tokens': expected at least 1, or 'echo' to be true.",
                param="max_tokens",
                code="integer_below_min_value",
            )
        spec = self._engine.spec
        texts = self._completion_prompts
        prompts = await texts.prompts_of(wire, prompt_limit(wire, spec), prompt_name, with_text=echo)
        if wire.truncate_prompt_tokens is not None:
            num_generated = default_max_tokens if wire.max_tokens is None else max(wire.max_tokens, 1)
            prompts = [
                await texts.shortened(prompt, truncated(prompt.token_ids, wire, num_generated, spec))
                for prompt in prompts
            ]
        if len(prompts) * num_candidates(wire) > MAX_PROMPTS:
            name = "n" if wire.best_of is None else "best_of"
            raise InvalidRequestError(
                f"'{name}' times the number of prompts is more than {MAX_PROMPTS}. Send several requests.",
                param=name,
                code="integer_above_max_value",
            )
        max_tokens = [
            max_tokens_of(
                len(prompt.token_ids), wire.max_tokens, default_max_tokens, spec, prompt_name, limit_name
            )
            for prompt in prompts
        ]
        return self._call(
            wire,
            grammar or await self.structured_output.grammar_of(wire),
            arrival=arrival,
            id_prefix="cmpl-",
            prompts=prompts,
            max_tokens=max_tokens,
            num_logprobs=wire.logprobs,
            continues_prompt=True,
            echo=echo,
            is_scoring=is_scoring,
        )

    async def parsed(self, model: type[W], body: dict[str, Any], num_bytes: int) -> W:
        """A body as a wire model whose fields can all be honoured. Raises ApiError."""
        try:
            if num_bytes <= OFF_LOOP_BYTES:
                wire = model.model_validate(body)
            else:
                wire = await asyncio.to_thread(model.model_validate, body)
        except ValidationError as error:
            raise invalid_field(error) from None
        if wire.model in _ANY_MODEL and wire.model not in self._served_model_names:
            wire = wire.model_copy(update={"model": None})
        if wire.model is not None and wire.model not in self._served_model_names:
            raise ModelNotFoundError(
                f"The model {excerpt(wire.model)} does not exist. This server has: "
                f"{', '.join(self._served_model_names)}.",
                param="model",
            )
        check_fields(wire, self._on_unknown_field)
        return wire

    async def _sampling(self, model: type[S], body: dict[str, Any], num_bytes: int) -> S:
        wire = await self.parsed(model, body, num_bytes)
        check_candidates(wire)
        if wire.stream_options is not None and not wire.stream:
            raise InvalidRequestError(
                "'stream_options' needs 'stream' to be true.", param="stream_options", code="invalid_value"
            )
        if wire.prompt_logprobs is not None and wire.stream:
            raise InvalidRequestError(
                "'prompt_logprobs' cannot be streamed.", param="prompt_logprobs", code="invalid_value"
            )
        if wire.truncate_prompt_tokens == 0:
            raise InvalidRequestError(
                "Invalid 'truncate_prompt_tokens': expected at least 1, or -1 for what fits.",
                param="truncate_prompt_tokens",
                code="integer_below_min_value",
            )
        return wire

    def _call(
        self,
        wire: SamplingFields,
        grammar: str | None,
        *,
        arrival: float,
        id_prefix: str,
        prompts: Sequence[Prompt],
        max_tokens: Sequence[int],
        num_logprobs: int | None,
        continues_prompt: bool,
        syntax: OutputSyntax | None = None,
        echo: bool = False,
        is_scoring: bool = False,
    ) -> Call:
        if wire.use_beam_search and grammar is not None:
            raise InvalidRequestError(
                "'use_beam_search' cannot be combined with what constrains the answer (a response format, "
                "required calls of tools, a thinking budget).",
                param="use_beam_search",
                code="invalid_value",
            )
        n, best_of = wire.n or 1, num_candidates(wire)
        # The client's own id is for the client: two requests may have the same.
        call_id = f"{id_prefix}{uuid.uuid4().hex}"
        num_requests = best_of * len(prompts)
        seed = secrets.randbits(63) if wire.seed is None else wire.seed
        prompt_logprobs = [
            num for num in (wire.prompt_logprobs, num_logprobs if echo else None) if num is not None
        ]
        shared = sampling_fields(
            wire,
            self._tokenization.tokenizer,
            self._engine.spec.vocab_size,
            # The best of several are found by them.
            logprobs=0 if num_logprobs is None and best_of > n else num_logprobs,
            prompt_logprobs=max(prompt_logprobs, default=None),
        )
        requests = []
        for index in range(num_requests):
            prompt, limit = prompts[index // best_of], max_tokens[index // best_of]
            if wire.min_tokens is not None and wire.min_tokens > limit:
                raise InvalidRequestError(
                    f"'min_tokens' is more than the {limit} tokens that may be generated.",
                    param="min_tokens",
                    code="integer_above_max_value",
                )
            requests.append(
                Request(
                    request_id=call_id if num_requests == 1 else f"{call_id}-{index}",
                    prompt_token_ids=prompt.token_ids,
                    params=SamplingParams(
                        **shared,
                        seed=(seed + index % best_of) & _SEED_MASK,
                        max_tokens=limit,
                        min_tokens=wire.min_tokens or 0,
                    ),
                    arrival_time=arrival,
                    priority=wire.priority or 0,
                    cache_salt=wire.cache_salt,
                    grammar=grammar,
                )
            )
        stop, options = wire.stop or (), wire.stream_options or StreamOptions()
        call = Call(
            id=call_id if wire.request_id is None else f"{id_prefix}{wire.request_id}",
            created=int(time.time()),
            model=wire.model or self._served_model_names[0],
            requests=tuple(requests),
            prompts=tuple(prompts),
            n=n,
            best_of=best_of,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            include_stop=bool(wire.include_stop_str_in_output),
            skip_special_tokens=wire.skip_special_tokens is not False,
            is_stream=bool(wire.stream),
            include_usage=bool(options.include_usage),
            has_running_usage=bool(options.include_usage and options.continuous_usage_stats),
            num_logprobs=num_logprobs,
            length_penalty=length_penalty(wire),
            num_prompt_logprobs=wire.prompt_logprobs,
            shows_token_ids=bool(wire.return_token_ids),
            names_tokens_by_id=bool(wire.return_tokens_as_token_ids),
            continues_prompt=continues_prompt,
            echo=echo,
            is_scoring=is_scoring,
            syntax=syntax,
        )
        if wire.resume is None:
            return call
        return resumed(call, wire.resume, self._engine.spec.vocab_size)
