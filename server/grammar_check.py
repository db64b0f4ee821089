"""Has grammars compiled in a process of their own, so that a hostile one costs that process at most."""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from server.expendable_process import ExpendableProcess
from server.grammars import MAX_GRAMMAR_BYTES
from server.shortest_answer import reason_it_cannot_fit
from server.tokenizer import Tokenizer

TOO_COMPLEX = "it is too complex: it was not compiled within 0.7 s of a core and 2 GiB"
_MODULE = "engine_runtime.grammars.check"
_MAX_BYTES = 2 * MAX_GRAMMAR_BYTES  # llguidance's form is longer
_MAX_VERDICTS = 4096


class GrammarCheck:
    """Says what is wrong with grammars, one after the other, off the event loop.

    The process (60 MB, ready in 0.3 s) is started for the first grammar, and again after it was lost.
    Verdicts are remembered by content.

    Attributes:
        num_compiled, num_refused: grammars since the start that were not remembered, and how many were bad.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: Callable[[], int]) -> None:
        """
        Args:
            max_tokens: of any answer; asked once there is a grammar.
        """
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-check")
        self._process = ExpendableProcess(_MODULE, lambda: msgspec.msgpack.encode(tokenizer.vocabulary))
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()
        self.num_compiled = 0
        self.num_refused = 0

    async def error_in(self, grammar: str) -> str | None:
        """Why a grammar, in llguidance's form, cannot be used; None if it can."""
        encoded = grammar.encode()
        if len(encoded) > _MAX_BYTES:
            return f"it is longer than {_MAX_BYTES} bytes"
        digest = hashlib.sha256(encoded).digest()
        verdict = self._verdicts.get(digest)
        if verdict is None:
            ask = functools.partial(self._ask, grammar, self._max_tokens())
            verdict = await asyncio.get_running_loop().run_in_executor(self._thread, ask)
            self._verdicts[digest] = verdict
            if len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)
            self.num_compiled += 1
            self.num_refused += bool(verdict)
        else:
            self._verdicts.move_to_end(digest)
        return verdict or None

    def close(self) -> None:
        """Ends the process, if there is one."""
        self._thread.shutdown()
        self._process.close()

    def _ask(self, grammar: str, max_tokens: int) -> str:
        reason = reason_it_cannot_fit(grammar, max_tokens, self._tokenizer.longest_token)
        if reason is not None:
            return reason
        answer = self._process.ask(grammar.encode())
        return TOO_COMPLEX if answer is None else answer.decode()
