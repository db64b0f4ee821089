"""Follows sequences through their grammars: what the step loop asks for (``scheduler.grammars.Grammars``)."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import llguidance
import numpy as np

from engine_runtime.grammars.compiler import GrammarCompiler, GrammarError
from engine_runtime.kernels.numpy_types import Int32Array
from scheduler.messages import Accepted, Request, ScheduledSequence, TokenMasks, Vocabulary

_MAX_CACHED = 64
_MAX_CACHED_BYTES = 8 * 2**20
_NUM_COMPILERS = 2
_MAX_MASK_THREADS = 16
# With fewer cores, the threads of the model are on them: waking more takes longer than what they would do.
_LEAST_CORES = 8


@dataclass(slots=True)
class _Follower:
    """One sequence on its way.

    Attributes:
        held_until: below this number of generated tokens, stop tokens wait unless nothing else may come.
        num_generated: tokens that the matcher has taken.
        max_tokens: that may be generated; what is forced beyond them is not followed.
        reports: whether the log-probability of each token is wanted, so that none may come unsampled.
        forces: whether tokens without alternative come unsampled: neither ``reports`` nor are there
            penalties, for which the sampler has to count them.
    """

    matcher: llguidance.LLMatcher
    grammar: str
    stop_token_ids: tuple[int, ...]
    held_until: int
    ignored_token_ids: tuple[int, ...]
    forces: bool
    reports: bool
    num_generated: int
    max_tokens: int


class GrammarMatchers:
    """Compiles in threads of its own, and remembers grammars by content.

    A grammar that the API process has let through compiles within a second. A matcher that has come to its
    end knows how its lexer goes: it becomes the one that later matchers of its grammar are copied from.
    """

    def __init__(self, vocab_size: int, on_prepared: Callable[[], None]) -> None:
        """
        Args:
            vocab_size: columns of the logits.
            on_prepared: called from another thread when ``take_prepared`` has something to return.
        """
        self._vocab_size = vocab_size
        self._on_prepared = on_prepared
        self._threads = ThreadPoolExecutor(_NUM_COMPILERS, thread_name_prefix="grammar")
        self._compiler: Future[GrammarCompiler] | None = None
        self._vocabulary: Vocabulary | None = None
        num_cores = len(os.sched_getaffinity(0))
        self._parallel = (
            llguidance.LLExecutor(min(_MAX_MASK_THREADS, num_cores)) if num_cores >= _LEAST_CORES else None
        )
        self._preparing: dict[str, Request] = {}
        self._prepared: SimpleQueue[tuple[Request, llguidance.LLMatcher | None, str | None]] = SimpleQueue()
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._compiled_bytes = 0
        self._followers: dict[str, _Follower] = {}
        self._masks: Int32Array = np.zeros((0, 0), np.int32)

    def learn(self, vocabulary: Vocabulary) -> None:
        """Says what the tokens are, before the first request with a grammar. See ``warm_up``."""
        self._vocabulary = vocabulary
        self._compiler = None

    def warm_up(self) -> None:
        """Reads the vocabulary, unless that has begun already. Else the first request with a grammar does it.

        That holds the interpreter for 0.2 s with 49k tokens, so it is best done in idle time.
        """
        if self._compiler is None and self._vocabulary is not None:
            self._compiler = self._threads.submit(GrammarCompiler, self._vocabulary, self._vocab_size)

    # ---- scheduler.grammars.Grammars ----

    def prepare(self, request: Request) -> None:
        grammar = request.grammar
        assert grammar is not None
        if request.request_id in self._preparing or request.request_id in self._followers:
            raise ValueError(f"request {request.request_id!r} is running already")
        self.warm_up()
        self._preparing[request.request_id] = request
        matcher = self._compiled.get(grammar)
        if matcher is None:
            self._threads.submit(self._compile, request, grammar)
        else:
            self._compiled.move_to_end(grammar)
            self._prepared.put((request, matcher.deep_copy(), None))

    @property
    def has_prepared(self) -> bool:
        return not self._prepared.empty()

    def take_prepared(self) -> Sequence[tuple[Request, str | None]]:
        if self._prepared.empty():
            return ()
        taken: list[tuple[Request, str | None]] = []
        while True:
            try:
                request, matcher, error = self._prepared.get_nowait()
            except Empty:
                return taken
            if self._preparing.get(request.request_id) is not request:
                continue  # forgotten meanwhile
            del self._preparing[request.request_id]
            if matcher is not None:
                error = self._follow(request, matcher)
            taken.append((request, error))

    def masks(self, shares: Iterable[ScheduledSequence]) -> TokenMasks | None:
        if not self._followers:
            return None
        names = [s.request_id for s in shares if s.samples and s.request_id in self._followers]
        if not names:
            return None
        followers = [self._followers[name] for name in names]
        masks = self._room(len(names))
        address, num_bytes = masks.ctypes.data, masks.shape[1] * masks.itemsize
        if self._parallel is None:
            for row, follower in enumerate(followers):
                follower.matcher.unsafe_compute_mask_ptr(address + row * num_bytes, num_bytes)
        else:
            rows = [(follower.matcher, row) for row, follower in enumerate(followers)]
            self._parallel.unsafe_compute_mask_ptr(rows, address, num_bytes, len(rows))
        for row, follower in zip(masks, followers, strict=False):
            _hold_back(row, follower)
        return TokenMasks(tuple(names), masks[: len(names)].tobytes())

    def accept(self, request_id: str, token_id: int) -> Accepted:
        follower = self._followers[request_id]
        matcher, eos_token_ids = follower.matcher, self._eos_token_ids()
        is_taken = matcher.consume_token(token_id)
        follower.num_generated += 1
        if not is_taken or matcher.is_error():
            return Accepted(error=f"the grammar cannot go on: {matcher.get_error() or matcher.stop_reason()}")
        if token_id in eos_token_ids and matcher.is_stopped():
            return Accepted(has_ended=True)
        forced: list[int] = []
        if follower.forces and not matcher.is_stopped():
            forced = matcher.compute_ff_tokens()[: max(follower.max_tokens - follower.num_generated, 0)]
            if forced and not matcher.consume_tokens(forced):
                return Accepted(error=f"the grammar cannot go on: {matcher.get_error()}")
            follower.num_generated += len(forced)
        if matcher.is_stopped() and not follower.reports:
            return Accepted((*forced, eos_token_ids[0]), has_ended=True)
        return Accepted(tuple(forced))

    def forget(self, request_id: str) -> bool:
        follower = self._followers.pop(request_id, None)
        if follower is not None and follower.matcher.reset() and follower.grammar in self._compiled:
            self._compiled[follower.grammar] = follower.matcher
        return self._preparing.pop(request_id, None) is not None

    def shutdown(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ---- inside ----

    def _compile(self, request: Request, grammar: str) -> None:
        try:
            if self._compiler is None:
                raise GrammarError("the engine does not know the vocabulary")
            self._prepared.put((request, self._compiler.result().compile(grammar), None))
        except Exception as error:
            self._prepared.put((request, None, f"{type(error).__name__}: {error}"))
        self._on_prepared()

    def _follow(self, request: Request, matcher: llguidance.LLMatcher) -> str | None:
        """Begins to follow a sequence; returns what is wrong."""
        assert request.grammar is not None
        self._remember(request.grammar, matcher)
        params, eos_token_ids = request.params, self._eos_token_ids()
        follower = _Follower(
            matcher=matcher,
            grammar=request.grammar,
            stop_token_ids=params.stop_token_ids,
            held_until=params.min_tokens,
            ignored_token_ids=tuple(t for t in eos_token_ids if t not in params.stop_token_ids),
            reports=params.logprobs is not None,
            forces=params.logprobs is None
            and params.presence_penalty == params.frequency_penalty == 0.0
            and params.repetition_penalty == 1.0,
            num_generated=len(request.generated_token_ids),
            max_tokens=params.max_tokens,
        )
        if not matcher.consume_tokens(list(request.generated_token_ids)):
            return f"the tokens so far do not follow the grammar: {matcher.get_error()}"
        self._followers[request.request_id] = follower
        return None

    def _remember(self, grammar: str, matcher: llguidance.LLMatcher) -> None:
        if grammar in self._compiled:
            return
        self._compiled[grammar] = matcher.deep_copy()
        self._compiled_bytes += len(grammar)
        while len(self._compiled) > _MAX_CACHED or self._compiled_bytes > _MAX_CACHED_BYTES:
            oldest, _ = self._compiled.popitem(last=False)
            self._compiled_bytes -= len(oldest)

    def _eos_token_ids(self) -> tuple[int, ...]:
        assert self._compiler is not None
        return self._compiler.result().eos_token_ids

    def _room(self, num_rows: int) -> Int32Array:
        """[at least num_rows, words] to write masks to."""
        if len(self._masks) < num_rows:
            assert self._compiler is not None
            self._masks = np.zeros((num_rows, self._compiler.result().num_mask_words), np.int32)
        return self._masks


def _hold_back(row: Int32Array, follower: _Follower) -> None:
    """Takes away tokens that would end the text too early, as long as others are left."""
    held = follower.ignored_token_ids
    if follower.num_generated < follower.held_until:
        held += follower.stop_token_ids
    if not held:
        return
    words = row.view(np.uint32)
    kept: dict[int, np.uint32] = {}
    for token_id in held:
        word, bit = divmod(token_id, 32)
        if word < len(words):
            kept.setdefault(word, words[word])
            words[word] &= np.uint32(~(1 << bit) & 0xFFFFFFFF)
    if kept and not words.any():
        for word, value in kept.items():
            words[word] = value
