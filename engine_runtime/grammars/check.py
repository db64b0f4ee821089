"""Compiles grammars of strangers in a process that may be lost: ``python -m engine_runtime.grammars.check``.

Some grammars keep llguidance busy for minutes and no limit of its own stops it; others might crash it. So the
API process has each new grammar compiled here first. What takes too long ends the process: the kernel does
it, whatever the process is busy with.

Frames on standard input and output: a length (4 bytes, little-endian), then so many bytes. In: a
``Vocabulary`` as msgpack, then one grammar after the other. Out: for each, what is wrong with it, or nothing.
"""

from __future__ import annotations

import resource
import signal
import sys
from typing import BinaryIO

import msgspec

from engine_runtime.grammars.compiler import GrammarCompiler, GrammarError, follow_forced
from scheduler.messages import Vocabulary

# Of a core: a busy machine makes no grammar worse. The other bound is for what waits instead.
_MAX_SECONDS = 0.7
_MAX_WAIT_S = 20.0
_MAX_BYTES = 2 * 2**30


def read_frame(stream: BinaryIO) -> bytes:
    """Raises EOFError where no whole frame comes any more."""
    head = stream.read(4)
    size = int.from_bytes(head, "little")
    body = stream.read(size) if len(head) == 4 else b""
    if len(head) < 4 or len(body) < size:
        raise EOFError
    return body


def write_frame(stream: BinaryIO, body: bytes) -> None:
    stream.write(len(body).to_bytes(4, "little") + body)
    stream.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C reaches the whole terminal
    resource.setrlimit(resource.RLIMIT_DATA, (_MAX_BYTES, _MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        vocabulary = msgspec.msgpack.decode(read_frame(requests), type=Vocabulary)
        try:
            compiler = GrammarCompiler(vocabulary)
        except GrammarError as error:
            while True:
                read_frame(requests)
                write_frame(answers, f"this model's tokenizer cannot follow grammars: {error}".encode())
        while True:
            write_frame(answers, _error_in(read_frame(requests).decode(), compiler).encode())
    except (EOFError, BrokenPipeError):
        pass


def _error_in(grammar: str, compiler: GrammarCompiler) -> str:
    _end_after(_MAX_SECONDS, _MAX_WAIT_S)
    try:
        follow_forced(compiler.compile(grammar))
    except GrammarError as error:
        return str(error)
    finally:
        _end_after(0.0, 0.0)
    return ""


def _end_after(core_seconds: float, seconds: float) -> None:
    """Has the kernel end this process (SIGPROF, SIGALRM: neither is handled); 0: never."""
    signal.setitimer(signal.ITIMER_PROF, core_seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds)


if __name__ == "__main__":
    main()
