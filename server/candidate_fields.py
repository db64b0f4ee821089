"""How many answers are generated for a prompt, and how: several samples, or a beam search."""

from __future__ import annotations

from server.errors import InvalidRequestError
from server.protocol import MAX_BEAM_WIDTH, MAX_BEST_OF, SamplingFields

# A beam search goes by how likely the model finds tokens; what changes that, or ends a text elsewhere, would
# have to be part of it. Each with the values that ask for nothing.
_NOT_WITH_BEAMS = {
    "stream": (None, False),
    "stop": (None, []),
    "min_tokens": (None, 0),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
}


def num_candidates(wire: SamplingFields) -> int:
    """Answers that are generated for a prompt: the width, if it is a beam search."""
    return wire.best_of or wire.n or 1


def length_penalty(wire: SamplingFields) -> float | None:
    """Of the beam search that was asked for; None if none was."""
    if not wire.use_beam_search:
        return None
    return 1.0 if wire.length_penalty is None else float(wire.length_penalty)


def check_candidates(wire: SamplingFields) -> None:
    """Raises InvalidRequestError if the fields do not fit together."""
    n, count = wire.n or 1, num_candidates(wire)
    if count < n:
        raise InvalidRequestError(
            f"'best_of' is {count}, but has to be at least 'n', which is {n}.",
            param="best_of",
            code="integer_below_min_value",
        )
    if wire.use_beam_search:
        _check_beams(wire, count)
        return
    if wire.length_penalty not in (None, 1):
        raise InvalidRequestError(
            "'length_penalty' needs 'use_beam_search' to be true.",
            param="length_penalty",
            code="invalid_value",
        )
    if count > n:
        if count > MAX_BEST_OF:
            raise InvalidRequestError(
                f"'best_of' is {count}, but may be at most {MAX_BEST_OF} if it is more than 'n'.",
                param="best_of",
                code="integer_above_max_value",
            )
        if wire.stream:
            raise InvalidRequestError(
                "'best_of' cannot be streamed: which answers are best is known at the end.",
                param="best_of",
                code="invalid_value",
            )


def _check_beams(wire: SamplingFields, width: int) -> None:
    if width > MAX_BEAM_WIDTH:
        name = "n" if wire.best_of is None else "best_of"
        raise InvalidRequestError(
            f"'{name}' is {width}, but a beam search is at most {MAX_BEAM_WIDTH} wide.",
            param=name,
            code="integer_above_max_value",
        )
    for name, unused in _NOT_WITH_BEAMS.items():
        if getattr(wire, name) not in unused:
            raise InvalidRequestError(
                f"'{name}' cannot be combined with 'use_beam_search'.", param=name, code="invalid_value"
            )
