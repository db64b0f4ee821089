"""Has grammars compiled in a process of their own, so that a hostile one costs that process at most."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import subprocess
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import msgspec

from server.grammars import MAX_GRAMMAR_BYTES
from server.tokenizer import Tokenizer

TOO_COMPLEX = "it is too complex: it was not compiled within 0.7 s and 2 GiB"
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

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-check")
        self._process: subprocess.Popen[bytes] | None = None
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
            verdict = await asyncio.get_running_loop().run_in_executor(self._thread, self._ask, encoded)
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
        self._end()

    def _ask(self, grammar: bytes) -> str:
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(_frame(grammar))
            self._process.stdin.flush()
            head = self._process.stdout.read(4)
            answer = self._process.stdout.read(int.from_bytes(head, "little"))
        except OSError:
            head, answer = b"", b""
        if len(head) < 4 or len(answer) < int.from_bytes(head, "little"):
            self._end()
            return TOO_COMPLEX
        return answer.decode()

    def _start(self) -> None:
        command = [sys.executable, "-m", _MODULE]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        self._process.stdin.write(_frame(msgspec.msgpack.encode(self._tokenizer.vocabulary)))

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError):
                process.communicate()


def _frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body
