"""Who may wait for the engine, how long, and whose turn it is."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from scheduler.messages import Request
from server.api_keys import cache_scope
from server.config import ServerConfig
from server.engine_protocol import EngineClient
from server.errors import ApiError, DeadlineError, OverloadedError, QueueTimeoutError

# Defaults, in multiples of what the engine works on at a time.
_QUEUED_BATCHES = 4
_QUEUED_STEPS = 128
# So many more than can run are handed over, so that a place that gets free is taken in the next step.
_AHEAD_SHARE = 8
_MIN_AHEAD = 4
# Where there are several keys: one of them holds this share of the places at most, and has so many steps of
# prompts in the engine that it has not begun to answer.
_KEY_SHARE = 0.75
_UNBEGUN_STEPS = 8
_RATE_WINDOW = 64
_UNKNOWN_INTERVAL_S = 0.1
# OpenAI's SDK takes no advice to wait longer than a minute: it comes back after half a second instead.
_MIN_WAIT_S, _MAX_WAIT_S = 1.0, 60.0


@dataclass(slots=True, eq=False)
class _Place:
    """One sequence on its way: it waits here, is handed to the engine, begins to answer, and is gone."""

    key: str | None
    num_tokens: int
    turn: asyncio.Future[None] | None = None
    failure: ApiError | None = None
    is_waiting: bool = True
    is_held: bool = False
    has_begun: bool = False


@dataclass(slots=True)
class _Line:
    """What one key has here.

    Attributes:
        waiting: (priority, order, place), a heap. Places that do not wait any more stay until they are first.
        num_waiting, num_waiting_tokens: those that do, and of their prompts.
        num_held: sequences in the engine.
        unbegun_tokens: of their prompts, as long as they have no token.
        num_calls: calls that are not finished.
    """

    waiting: list[tuple[int, int, _Place]] = field(default_factory=list)
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_held: int = 0
    unbegun_tokens: int = 0
    num_calls: int = 0

    @property
    def first(self) -> _Place | None:
        while self.waiting and not self.waiting[0][2].is_waiting:
            heapq.heappop(self.waiting)
        return self.waiting[0][2] if self.waiting else None


class Admission:
    """A line of bounded length in front of the engine, fair to the keys.

    The engine gets as many sequences as it can run and a few more; the others wait here, where they cost
    nothing. The next is the first of the key that has the fewest in the engine; of one key, by priority and
    arrival. Without several keys all are one.

    Whoever comes to a full line is refused at once (429). A call into an empty line is always taken, however
    many choices it wants.
    """

    def __init__(self, config: ServerConfig, engine: EngineClient) -> None:
        self._config = config
        self._engine = engine
        self._has_keys = config.api_keys.is_shared_by_several
        self._places: dict[str, _Place] = {}
        self._lines: dict[str | None, _Line] = {}
        self._order = itertools.count()
        self._num_held = 0
        self._ends: deque[float] = deque(maxlen=_RATE_WINDOW)
        self._last_return = 0.0
        self.num_waiting = 0
        self.num_waiting_tokens = 0
        self.rejections: Counter[str] = Counter(dict.fromkeys(("requests", "tokens", "key", "timeout"), 0))

    @property
    def max_waiting(self) -> int:
        return self._share(
            self._config.max_queued_requests or _QUEUED_BATCHES * self._engine.spec.max_num_seqs
        )

    @property
    def max_waiting_tokens(self) -> int:
        spec = self._engine.spec
        return self._share(self._config.max_queued_tokens or _QUEUED_STEPS * spec.max_num_batched_tokens)

    def _share(self, bound: int) -> int:
        """Of a bound of the whole server: each API process has a line of its own."""
        return -(-bound // self._config.api_workers)

    def check(self) -> None:
        """Raises OverloadedError if no request could be taken, before anything is spent on one."""
        refusal = self.refusal(cache_scope.get())
        if refusal is not None:
            raise refusal

    def refusal(self, key: str | None) -> OverloadedError | None:
        """Why no call of ``key``, however small, could be taken now; None if one could."""
        if self._room(key)[0] < 1:
            return self._refused("requests", self.max_waiting, 0)
        if self._config.max_requests_per_key is not None:
            most, line = self._share(self._config.max_requests_per_key), self._lines.get(key)
            if line is not None and line.num_calls >= most:
                return self._refused("key", most, 0)
        return None

    def _room(self, key: str | None) -> tuple[int, int]:
        """Sequences, and tokens of prompts, that may still join the line. A key leaves some to the others."""
        most, most_tokens = self.max_waiting, self.max_waiting_tokens
        room, room_tokens = most - self.num_waiting, most_tokens - self.num_waiting_tokens
        line = self._lines.get(key)
        if self._has_keys and line is not None and line.num_waiting:
            room = min(room, max(1, int(most * _KEY_SHARE)) - line.num_waiting)
            room_tokens = min(room_tokens, int(most_tokens * _KEY_SHARE) - line.num_waiting_tokens)
        return room, room_tokens

    def limits(self) -> dict[str, str]:
        """What a response tells of the line, in the headers that OpenAI has for it."""
        most, most_tokens = self.max_waiting, self.max_waiting_tokens
        return {
            "x-ratelimit-limit-requests": str(most),
            "x-ratelimit-remaining-requests": str(max(0, most - self.num_waiting)),
            "x-ratelimit-reset-requests": f"{self.num_waiting * self.interval:.1f}s",
            "x-ratelimit-limit-tokens": str(most_tokens),
            "x-ratelimit-remaining-tokens": str(max(0, most_tokens - self.num_waiting_tokens)),
        }

    @contextmanager
    def admit(self, requests: Sequence[Request]) -> Iterator[None]:
        """The time of a call in line and engine. Raises OverloadedError."""
        key = cache_scope.get()
        num_tokens = sum(map(len, {request.prompt_token_ids for request in requests}))
        if self.num_waiting:
            room, room_tokens = self._room(key)
            if len(requests) > room:
                raise self._refused("requests", self.max_waiting, max(0, room))
            if num_tokens > room_tokens:
                raise self._refused("tokens", self.max_waiting_tokens, max(0, room_tokens))
        refusal = self.refusal(key)
        if refusal is not None:
            raise refusal
        line = self._lines.setdefault(key, _Line())
        line.num_calls += 1
        share = -(-num_tokens // len(requests))
        for request in requests:
            place = self._places[request.request_id] = _Place(key, share)
            heapq.heappush(line.waiting, (request.priority, next(self._order), place))
        line.num_waiting += len(requests)
        line.num_waiting_tokens += share * len(requests)
        self.num_waiting += len(requests)
        self.num_waiting_tokens += share * len(requests)
        deadline = self._set_deadline(requests)
        self._hand_over()
        try:
            yield
        finally:
            if deadline is not None:
                deadline.cancel()
            for request in requests:
                self.end(request.request_id)
                del self._places[request.request_id]
            line.num_calls -= 1
            if not line.num_calls:
                del self._lines[key]

    async def turn(self, request_id: str) -> None:
        """Waits until the sequence may be handed to the engine.

        Raises:
            QueueTimeoutError: that took too long.
            DeadlineError: the time for the whole call is over.
        """
        place = self._places[request_id]
        if place.failure is not None:
            raise place.failure
        if not place.is_waiting:
            return
        place.turn = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._config.queue_timeout or None):
                await place.turn
        except TimeoutError:
            self.rejections["timeout"] += 1
            raise QueueTimeoutError(self._wait_seconds()) from None

    def begin(self, request_id: str) -> None:
        """The sequence has its first token."""
        place = self._places[request_id]
        if place.is_held and not place.has_begun:
            place.has_begun = True
            self._lines[place.key].unbegun_tokens -= place.num_tokens
            if self.num_waiting:
                self._hand_over()

    def end(self, request_id: str) -> None:
        """The sequence is of no more interest. Twice does nothing."""
        place = self._places.get(request_id)
        if place is None:
            return
        if place.is_waiting:
            self._stop_waiting(place)
        elif place.is_held:
            line = self._lines[place.key]
            place.is_held = False
            self._num_held -= 1
            line.num_held -= 1
            if not place.has_begun:
                line.unbegun_tokens -= place.num_tokens
            self._ends.append(time.monotonic())
            if not self._num_held:  # the next end tells how long nobody came
                self._ends.clear()
            self._hand_over()

    def _stop_waiting(self, place: _Place) -> None:
        place.is_waiting = False
        line = self._lines[place.key]
        line.num_waiting -= 1
        line.num_waiting_tokens -= place.num_tokens
        self.num_waiting -= 1
        self.num_waiting_tokens -= place.num_tokens

    def _hand_over(self) -> None:
        """Gives places in the engine to those who wait, as long as there are any."""
        spec = self._engine.spec
        num_places = spec.max_num_seqs + max(_MIN_AHEAD, spec.max_num_seqs // _AHEAD_SHARE)
        most_of_key = max(1, int(num_places * _KEY_SHARE)) if self._has_keys else num_places
        most_tokens = _UNBEGUN_STEPS * spec.max_num_batched_tokens
        while self.num_waiting and self._num_held < num_places:
            best: _Line | None = None
            for line in self._lines.values():
                first = line.first
                if first is None or line.num_held >= most_of_key:
                    continue
                if (
                    self._has_keys
                    and line.unbegun_tokens
                    and line.unbegun_tokens + first.num_tokens > most_tokens
                ):
                    continue
                if best is None or (line.num_held, line.waiting[0][1]) < (best.num_held, best.waiting[0][1]):
                    best = line
            if best is None:
                return
            place = heapq.heappop(best.waiting)[2]
            self._stop_waiting(place)
            place.is_held = True
            self._num_held += 1
            best.num_held += 1
            best.unbegun_tokens += place.num_tokens
            if place.turn is not None and not place.turn.done():
                place.turn.set_result(None)

    def _set_deadline(self, requests: Sequence[Request]) -> asyncio.TimerHandle | None:
        if not self._config.request_timeout:
            return None
        used = max(0.0, time.monotonic() - requests[0].arrival_time)
        left = max(0.0, self._config.request_timeout - used)
        return asyncio.get_running_loop().call_later(left, self._on_deadline, requests)

    def _on_deadline(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.fail(request.request_id, DeadlineError(self._config.request_timeout))

    def is_waiting(self, request_id: str) -> bool:
        """Whether the sequence waits in the line."""
        place = self._places.get(request_id)
        return place is not None and place.is_waiting

    def fail(self, request_id: str, error: ApiError) -> None:
        """Ends a sequence with an error, wherever it is."""
        place = self._places[request_id]
        place.failure = error
        if place.turn is not None and not place.turn.done():
            place.turn.set_exception(error)
        else:
            self._engine.fail(request_id, error)

    def _refused(self, reason: str, limit: int, remaining: int) -> OverloadedError:
        self.rejections[reason] += 1
        return OverloadedError(reason, limit, remaining, self._wait_seconds())

    @property
    def interval(self) -> float:
        """Seconds from one end to the next, going by the last ones."""
        ends = self._ends
        if len(ends) < 2:
            return _UNKNOWN_INTERVAL_S
        return max(ends[-1] - ends[0], 0.001) / (len(ends) - 1)

    def _wait_seconds(self) -> float:
        """When a place may be free for one who is refused now.

        Those who are refused come back one after the other, behind the line that stands and at the rate at
        which places get free. If that is too far away, they come at any time of its second half.
        """
        now, interval = time.monotonic(), self.interval
        first = now + max(_MIN_WAIT_S, self.num_waiting * interval)
        self._last_return = min(max(self._last_return + interval, first), now + _MAX_WAIT_S + interval)
        wait = self._last_return - now
        return wait if wait <= _MAX_WAIT_S else random.uniform(_MAX_WAIT_S / 2, _MAX_WAIT_S)
