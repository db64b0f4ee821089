"""Beam search: the likeliest texts, instead of one that is sampled token by token.

Only the search itself: who asks the model is ``beam_streams``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import attrgetter

from scheduler.messages import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Beam:
    """A text that may become an answer.

    Attributes:
        token_ids: what was generated, with the stop token of one that has ended.
        logprob: of all of them together, natural logarithm.
        score: by which texts are compared; the larger the better.
        parent, last: the beam that this one goes on from, and the token with which it does; None for the
            empty text.
        has_stopped: whether the last token is a stop token.
    """

    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0
    score: float = 0.0
    parent: Beam | None = None
    last: TokenLogprobs | None = None
    has_stopped: bool = False

    def records(self) -> tuple[TokenLogprobs, ...]:
        """How likely each token was."""
        found = []
        beam: Beam | None = self
        while beam is not None and beam.last is not None:
            found.append(beam.last)
            beam = beam.parent
        return tuple(reversed(found))


class BeamSearch:
    """Keeps the ``width`` best texts of equal length and those that have ended, as vLLM does.

    Each step asks the model for the ``num_candidates`` likeliest tokens behind each beam. Those that stop a
    text end one; of all others the best ``width`` are the beams of the next step. The score of a text is its
    log probability divided by its length ** ``length_penalty``, where the length counts the prompt and no
    stop token.

    The search ends when no beam can get better than the ``width`` best that have ended, however it goes on,
    or at ``max_tokens``; then beams that have not ended count as texts too.

    Attributes:
        beams: what the model has to be asked about, best first; none at the end.
    """

    def __init__(
        self,
        width: int,
        length_penalty: float,
        *,
        prompt_length: int,
        max_tokens: int,
        stop_token_ids: Collection[int],
    ) -> None:
        self.width = width
        self.beams: list[Beam] = [Beam()]
        self._length_penalty = length_penalty
        self._prompt_length = prompt_length
        self._max_tokens = max_tokens
        self._stop_token_ids = frozenset(stop_token_ids)
        self._ended: list[Beam] = []

    @property
    def num_candidates(self) -> int:
        """Tokens to be told of behind each beam: enough if one half of them were stop tokens."""
        return 2 * self.width

    def advance(self, records: Sequence[TokenLogprobs]) -> None:
        """Takes what the model says of the next token of each of ``beams``: its ``top`` counts."""
        going_on: list[Beam] = []
        for beam, record in zip(self.beams, records, strict=True):
            for rank, (token_id, logprob) in enumerate(record.top[: self.num_candidates], 1):
                if logprob == -math.inf:
                    break
                has_stopped = token_id in self._stop_token_ids
                extended = self._extended(
                    beam, TokenLogprobs(token_id, logprob, rank, record.top), has_stopped=has_stopped
                )
                (self._ended if has_stopped else going_on).append(extended)
        self.beams = _best(going_on, self.width)
        self._ended = _best(self._ended, self.width)
        if self.beams and len(self.beams[0].token_ids) == self._max_tokens:
            self._ended = _best([*self._ended, *self.beams], self.width)
            self.beams = []
        elif len(self._ended) == self.width and self._limit() <= self._ended[-1].score:
            self.beams = []

    def best(self) -> list[Beam]:
        """The ``width`` best texts, the best first, once there are no more ``beams``."""
        return list(self._ended)

    def _extended(self, beam: Beam, last: TokenLogprobs, *, has_stopped: bool) -> Beam:
        token_ids = (*beam.token_ids, last.token_id)
        logprob = beam.logprob + last.logprob
        score = self._score(logprob, len(token_ids) - has_stopped)
        return Beam(token_ids, logprob, score, beam, last, has_stopped)

    def _score(self, logprob: float, num_tokens: int) -> float:
        return logprob / math.pow(self._prompt_length + num_tokens, self._length_penalty)

    def _limit(self) -> float:
        """A score that no text reached from ``beams`` exceeds. More tokens make no text likelier, and the
        length counts for the most at one of its ends.
        """
        if not self.beams:
            return -math.inf
        likeliest = self.beams[0]
        longest = self._max_tokens if self._length_penalty > 0 else len(likeliest.token_ids)
        return self._score(likeliest.logprob, longest)


def _best(beams: list[Beam], count: int) -> list[Beam]:
    """Of equal ones, those that come first."""
    return sorted(beams, key=attrgetter("score"), reverse=True)[:count]
