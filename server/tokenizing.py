"""Answers of ``/tokenize`` and ``/detokenize``, as vLLM writes them."""

from __future__ import annotations

from typing import Any

import msgspec

from server.chat_template import ChatTemplateError
from server.engine_protocol import EngineClient
from server.errors import ContextLengthError, InvalidRequestError
from server.protocol import (
    MAX_PROMPT_TOKENS,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from server.tokenization import TextTooLongError, Tokenization
from server.tokenizer import InvalidTextError
from server.validation import Validator

_encode = msgspec.json.Encoder().encode


class Tokenizing:
    """Text to token ids and back for clients. The model is not run, and its context is no limit."""

    def __init__(self, engine: EngineClient, tokenization: Tokenization, validator: Validator) -> None:
        self._engine = engine
        self._tokenization = tokenization
        self._validator = validator

    async def tokenize(self, body: dict[str, Any], num_bytes: int) -> bytes:
        """The body of the answer: number, ids and maybe names of the tokens. Raises ApiError."""
        max_model_len = self._engine.spec.max_model_len
        is_chat = "messages" in body
        if is_chat and "prompt" in body:
            raise InvalidRequestError(
                "Send either 'prompt' or 'messages'.", param="messages", code="invalid_value"
            )
        name = "messages" if is_chat else "prompt"
        try:
            if is_chat:
                chat = await self._validator.parsed(TokenizeChatRequest, body, num_bytes)
                with_names = bool(chat.return_token_strs)
                prompt = await self._validator.chat_prompts.prompt_of(chat, MAX_PROMPT_TOKENS)
                token_ids = list(prompt.token_ids)
            else:
                text = await self._validator.parsed(TokenizeCompletionRequest, body, num_bytes)
                with_names = bool(text.return_token_strs)
                [token_ids] = await self._tokenization.encode(
                    [text.prompt], MAX_PROMPT_TOKENS, add_special_tokens=text.add_special_tokens is not False
                )
        except TextTooLongError as error:
            raise _too_long(name, f"at least {error.num_tokens}") from None
        except (ChatTemplateError, InvalidTextError) as error:
            raise InvalidRequestError(str(error), param=name, code="invalid_value") from None
        if len(token_ids) > MAX_PROMPT_TOKENS:
            raise _too_long(name, str(len(token_ids)))
        return _encode(
            {
                "count": len(token_ids),
                "max_model_len": max_model_len,
                "tokens": token_ids,
                "token_strs": await self._tokenization.names(token_ids) if with_names else None,
            }
        )

    async def detokenize(self, body: dict[str, Any], num_bytes: int) -> bytes:
        """The body of the answer: the text of the tokens, control tokens by their names. Raises ApiError."""
        vocab_size = self._engine.spec.vocab_size
        wire = await self._validator.parsed(DetokenizeRequest, body, num_bytes)
        if max(wire.tokens, default=0) >= vocab_size:
            position = next(i for i, token_id in enumerate(wire.tokens) if token_id >= vocab_size)
            raise InvalidRequestError(
                f"'tokens[{position}]' is no token of this model, which has {vocab_size}.",
                param=f"tokens[{position}]",
                code="integer_above_max_value",
            )
        return _encode({"prompt": await self._tokenization.decode(wire.tokens, skip_special_tokens=False)})


def _too_long(name: str, num_tokens: str) -> ContextLengthError:
    return ContextLengthError(
        f"At most {MAX_PROMPT_TOKENS} tokens are taken at once, but the {name} resulted in {num_tokens}. "
        f"Shorten the {name}.",
        param=name,
    )
