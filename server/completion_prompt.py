"""The prompts of text completions: texts or token ids, one or many."""

from __future__ import annotations

from server.call import Prompt
from server.context import far_too_long
from server.engine_protocol import EngineClient
from server.errors import InvalidRequestError
from server.protocol import CompletionRequest
from server.tokenization import TextTooLongError, Tokenization
from server.tokenizer import InvalidTextError


class CompletionPrompts:
    """Reads prompts for one model."""

    def __init__(self, engine: EngineClient, tokenization: Tokenization) -> None:
        self._engine = engine
        self._tokenization = tokenization

    async def prompts_of(
        self, wire: CompletionRequest, limit: int, name: str, *, with_text: bool
    ) -> list[Prompt]:
        """The prompts of a request, those of texts maybe a few tokens longer than ``limit``.

        Args:
            name: the field of the prompt in messages.
            with_text: keep the texts.

        Raises:
            InvalidRequestError: ids that are no tokens of the model, or texts that are certainly too long.
        """
        prompt, spec = wire.prompt, self._engine.spec
        texts: list[str] = []
        if isinstance(prompt, str):
            texts = [prompt]
        else:
            texts = [part for part in prompt if isinstance(part, str)]
        if texts:
            try:
                encoded = await self._tokenization.encode(
                    texts, limit, add_special_tokens=wire.add_special_tokens is not False
                )
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

    async def shortened(self, prompt: Prompt, token_ids: tuple[int, ...]) -> Prompt:
        """A prompt of which only ``token_ids`` are left."""
        if len(token_ids) == len(prompt.token_ids):
            return prompt
        text = None if prompt.text is None else await self._tokenization.decode(token_ids)
        return Prompt(token_ids, text)

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
