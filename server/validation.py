"""From the body of an HTTP request to what the engine takes, once. Behind this nothing can be wrong."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from scheduler.messages import ExecutorSpec, Request, SamplingParams
from server.call import Call, Prompt
from server.chat_grammar import ChatGrammars
from server.chat_prompt import ChatPrompt, ChatPrompts
from server.chat_template import ChatTemplateError
from server.engine_protocol import EngineClient
from server.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError, excerpt
from server.field_errors import invalid_field
from server.fields import check_fields
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
)
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
        count_unknown: Callable[[str], None],
        formats: ModelFormats | None = None,
    ) -> None:
        """``formats`` are those of the model's answers; None finds them out from its chat template."""
        self._engine = engine
        self._tokenization = tokenization
        self.structured_output = structured_output
        self._served_model_names = tuple(served_model_names)
        self._count_unknown = count_unknown
        if formats is None:
            formats = model_formats(tokenization.tokenizer.chat_template)
        self.chat_prompts = ChatPrompts(tokenization, formats)
        self._chat_grammars = ChatGrammars(tokenization.tokenizer, structured_output)

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
        if wire.top_logprobs is not None and not wire.logprobs:
            raise InvalidRequestError(
                "'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs", code="invalid_value"
            )
        spec = self._engine.spec
        chat = await self.chat_prompt(wire, max_context(spec), prompt_name)
        if limit_name is None:
            limit_name = "max_tokens" if wire.max_completion_tokens is None else "max_completion_tokens"
        limit = wire.max_tokens if wire.max_completion_tokens is None else wire.max_completion_tokens
        max_tokens = _max_tokens(len(chat.token_ids), limit, None, spec, prompt_name, limit_name)
        return self._call(
            wire,
            await self._chat_grammars.grammar_of(wire, chat),
            arrival=arrival,
            id_prefix=id_prefix,
            prompts=[Prompt(chat.token_ids)],
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
        prompts = await self._prompts(wire.prompt, spec, prompt_name, with_text=echo)
        if len(prompts) * (wire.n or 1) > MAX_PROMPTS:
            raise InvalidRequestError(
                f"'n' times the number of prompts is more than {MAX_PROMPTS}. Send several requests.",
                param="n",
                code="integer_above_max_value",
            )
        max_tokens = [
            _max_tokens(
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
        check_fields(wire, self._count_unknown)
        return wire

    async def _sampling(self, model: type[S], body: dict[str, Any], num_bytes: int) -> S:
        wire = await self.parsed(model, body, num_bytes)
        if wire.stream_options is not None and not wire.stream:
            raise InvalidRequestError(
                "'stream_options' needs 'stream' to be true.", param="stream_options", code="invalid_value"
            )
        return wire

    async def _prompts(
        self,
        prompt: str | list[str] | list[int] | list[list[int]],
        spec: ExecutorSpec,
        name: str,
        *,
        with_text: bool,
    ) -> list[Prompt]:
        """``name`` is the field of ``prompt`` in messages."""
        texts: list[str] = []
        if isinstance(prompt, str):
            texts = [prompt]
        else:
            texts = [part for part in prompt if isinstance(part, str)]
        if texts:
            try:
                encoded = await self._tokenization.encode(texts, max_context(spec))
            except TextTooLongError as error:
                raise far_too_long(error, spec, name) from None
            except InvalidTextError as error:
                raise InvalidRequestError(str(error), param=name, code="invalid_value") from None
            return [
                Prompt(self._not_empty(token_ids, name), text if with_text else None)
                for text, token_ids in zip(texts, encoded, strict=True)
            ]
        lists = [part for part in prompt if isinstance(part, list)] or [
            [part for part in prompt if isinstance(part, int)]
        ]
        prompts = []
        for index, token_ids in enumerate(lists):
            if max(token_ids) >= spec.vocab_size:
                position = next(i for i, token_id in enumerate(token_ids) if token_id >= spec.vocab_size)
                path = f"{name}[{position}]" if len(lists) == 1 else f"{name}[{index}][{position}]"
                raise InvalidRequestError(
                    f"'{path}' is no token of this model, which has {spec.vocab_size}.",
                    param=path,
                    code="integer_above_max_value",
                )
            text = await self._tokenization.decode(token_ids) if with_text else None
            prompts.append(Prompt(tuple(token_ids), text))
        return prompts

    def _not_empty(self, token_ids: list[int], name: str) -> tuple[int, ...]:
        if token_ids:
            return tuple(token_ids)
        tokenizer = self._tokenization.tokenizer
        # An empty prompt asks for a text from its very beginning, which is what these tokens stand for.
        beginning = tokenizer.bos_token_id
        if beginning is None and tokenizer.eos_token_ids:
            beginning = min(tokenizer.eos_token_ids)
        if beginning is None:
            raise InvalidRequestError(f"The {name} has no tokens.", param=name, code="invalid_value")
        return (beginning,)

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
        n = wire.n or 1
        call_id = f"{id_prefix}{uuid.uuid4().hex}"
        num_choices = n * len(prompts)
        seed = secrets.randbits(63) if wire.seed is None else wire.seed
        shared = self._shared_params(wire, num_logprobs, num_logprobs if echo else None)
        requests = []
        for index in range(num_choices):
            prompt, limit = prompts[index // n], max_tokens[index // n]
            if wire.min_tokens is not None and wire.min_tokens > limit:
                raise InvalidRequestError(
                    f"'min_tokens' is more than the {limit} tokens that may be generated.",
                    param="min_tokens",
                    code="integer_above_max_value",
                )
            requests.append(
                Request(
                    request_id=call_id if num_choices == 1 else f"{call_id}-{index}",
                    prompt_token_ids=prompt.token_ids,
                    params=SamplingParams(
                        **shared,
                        seed=(seed + index % n) & _SEED_MASK,
                        max_tokens=limit,
                        min_tokens=wire.min_tokens or 0,
                    ),
                    arrival_time=arrival,
                    priority=wire.priority or 0,
                    cache_salt=wire.cache_salt,
                    grammar=grammar,
                )
            )
        stop = wire.stop or ()
        return Call(
            id=call_id,
            created=int(time.time()),
            model=wire.model or self._served_model_names[0],
            requests=tuple(requests),
            prompts=tuple(prompts),
            n=n,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            include_stop=bool(wire.include_stop_str_in_output),
            skip_special_tokens=wire.skip_special_tokens is not False,
            is_stream=bool(wire.stream),
            include_usage=wire.stream_options is not None and bool(wire.stream_options.include_usage),
            num_logprobs=num_logprobs,
            continues_prompt=continues_prompt,
            echo=echo,
            is_scoring=is_scoring,
            syntax=syntax,
        )

    def _shared_params(
        self, wire: SamplingFields, logprobs: int | None, prompt_logprobs: int | None
    ) -> dict[str, Any]:
        vocab_size = self._engine.spec.vocab_size
        stop_token_ids = list(wire.stop_token_ids or ())
        for index, token_id in enumerate(stop_token_ids):
            if token_id >= vocab_size:
                raise InvalidRequestError(
                    f"'stop_token_ids[{index}]' is no token of this model, which has {vocab_size}.",
                    param=f"stop_token_ids[{index}]",
                    code="integer_above_max_value",
                )
        if not wire.ignore_eos:
            stop_token_ids += self._tokenization.tokenizer.eos_token_ids
        return {
            "temperature": _given(wire.temperature, 1.0),
            "top_k": max(wire.top_k or 0, 0),
            "top_p": _given(wire.top_p, 1.0),
            "min_p": _given(wire.min_p, 0.0),
            "presence_penalty": _given(wire.presence_penalty, 0.0),
            "frequency_penalty": _given(wire.frequency_penalty, 0.0),
            "repetition_penalty": _given(wire.repetition_penalty, 1.0),
            "logit_bias": _logit_bias(wire.logit_bias or {}, vocab_size),
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
            "stop_token_ids": tuple(dict.fromkeys(stop_token_ids)),
        }


def _given(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _logit_bias(wire: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    biases = {}
    for key, value in wire.items():
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) <= 10 else -1
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"A key of 'logit_bias', {excerpt(key)}, is no token id: expected 0 to {vocab_size - 1}.",
                param="logit_bias",
                code="invalid_value",
            )
        biases[token_id] = float(value)
    return tuple(biases.items())


def max_context(spec: ExecutorSpec) -> int:
    """Prompt and generated tokens of one sequence at most: what the model allows and the KV pool holds."""
    return min(spec.max_model_len, spec.num_blocks * spec.block_size)


def far_too_long(error: TextTooLongError, spec: ExecutorSpec, prompt_name: str) -> ContextLengthError:
    return ContextLengthError(
        f"This model's context is {max_context(spec)} tokens long, but the {prompt_name} resulted in "
        f"at least {error.num_tokens} tokens. Shorten the {prompt_name}.",
        param=prompt_name,
    )


def _max_tokens(
    prompt_length: int,
    asked: int | None,
    default: int | None,
    spec: ExecutorSpec,
    prompt_name: str,
    limit_name: str,
) -> int:
    """How many tokens may be generated. Raises ContextLengthError if prompt and answer do not fit."""
    context = max_context(spec)
    left = context - prompt_length
    if asked is None:
        wanted = max(left, 1) if default is None else max(min(default, left), 1)
    else:
        wanted = max(asked, 1)
    if wanted <= left:
        return wanted
    if left < 1:
        raise ContextLengthError(
            f"This model's context is {context} tokens long, but the {prompt_name} resulted in "
            f"{prompt_length} tokens, which leaves no room for an answer. Shorten the {prompt_name}.",
            param=prompt_name,
        )
    raise ContextLengthError(
        f"This model's context is {context} tokens long, but you asked for "
        f"{prompt_length + wanted}: {prompt_length} in the {prompt_name} and {wanted} as {limit_name}. "
        f"Shorten the {prompt_name} or set {limit_name} to at most {left}.",
        param=limit_name,
    )
