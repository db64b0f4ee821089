"""Texts become token ids in threads, so that no stream waits for somebody else's prompt."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from server.request_template import RequestTemplates
from server.tokenizer import Tokenizer

T = TypeVar("T")

# Tokenizing this much takes some 10 ms; longer texts queue in a lane of their own.
_LONG_TEXT_CHARS = 64 * 1024
# That lane gets what processor time the streams leave over: a megabyte is a second of work.
_LONG_LANE_NICENESS = 10
# A pool of threads of the library's own would do the work instead, at the priority of whoever came first.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class TextTooLongError(Exception):
    """A text was not tokenized, since it has at least ``num_tokens`` tokens, which is over the limit."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(num_tokens)
        self.num_tokens = num_tokens


class Tokenization:
    """The tokenizer off the event loop: short texts in one thread, long ones in another.

    The tokenizer releases the GIL while it works, without which threads would be of no use.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._short = ThreadPoolExecutor(1, thread_name_prefix="tokenize-short")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="tokenize-long", initializer=_yield_to_others)
        # Templates of clients may keep theirs busy as long as they are let.
        self._foreign = ThreadPoolExecutor(1, thread_name_prefix="tokenize-foreign")
        self._request_templates = RequestTemplates(tokenizer.named_special_tokens)

    def close(self) -> None:
        """Ends what runs outside of this process."""
        self._foreign.shutdown()
        self._request_templates.close()

    async def encode(
        self, texts: Sequence[str], limit: int, *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of each text, by default with the special tokens that the model wants around a text.

        Raises:
            TextTooLongError: one of them is certainly over ``limit`` tokens. Those that come back may be.
            InvalidTextError: lone surrogates.
        """

        def work() -> list[list[int]]:
            for text in texts:
                self._refuse_far_too_long(text, limit)
            return self.tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)

        return await self._run(sum(map(len, texts)), work)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        limit: int,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continues_final: bool = False,
        variables: Mapping[str, Any] | None = None,
        template: str | None = None,
    ) -> list[int]:
        """Token ids of a conversation in the model's template, by default up to where its answer begins.

        The arguments are those of ``ChatTemplate.render``.

        Args:
            template: of the client, instead of the model's.

        Raises:
            ChatTemplateError: the model has no template, or its template refuses the conversation.
            TextTooLongError, InvalidTextError: as ``encode``.
        """

        num_chars = _num_chars(messages) + _num_chars(tools)
        options: dict[str, Any] = {
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continues_final": continues_final,
        }
        render: Callable[..., str] | None = None
        if template is not None:

            def render(messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
                # Variables may have any names, and the template's author need not be shielded from them.
                return self._request_templates.render(template, messages, {**(variables or {}), **options})

        elif self.tokenizer.chat_template is not None:
            render = self.tokenizer.chat_template.render
            options |= variables or {}

        def work() -> list[int]:
            if render is not None and num_chars > limit:
                # Written out twice, since templates may trim and drop what they are given.
                self._refuse_far_too_long(render(messages, **options), limit)
            return self.tokenizer.encode_chat(messages, render=render, **options)

        return await self._run(num_chars, work, None if template is None else self._foreign)

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        def work() -> str:
            return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

        return await self._run(len(token_ids), work)

    async def names(self, token_ids: Sequence[int]) -> list[str]:
        """What the vocabulary calls each token."""
        return await self._run(len(token_ids), lambda: [self.tokenizer.token_name(i) for i in token_ids])

    def _refuse_far_too_long(self, text: str, limit: int) -> None:
        if len(text) > limit and (num_tokens := self.tokenizer.min_tokens_for(text)) > limit:
            raise TextTooLongError(num_tokens)

    async def _run(self, num_chars: int, work: Callable[[], T], lane: ThreadPoolExecutor | None = None) -> T:
        if lane is None:
            lane = self._long if num_chars > _LONG_TEXT_CHARS else self._short
        return await asyncio.get_running_loop().run_in_executor(lane, work)


def _yield_to_others() -> None:
    if sys.platform == "linux":  # where each thread has a niceness of its own
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LONG_LANE_NICENESS)


def _num_chars(value: Any) -> int:
    """Letters of all strings in a JSON value, but for the names in objects."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_num_chars, value.values()))
    return sum(map(_num_chars, value)) if isinstance(value, list | tuple) else 0
