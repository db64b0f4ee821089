"""From the text of a grammar to a matcher: which tokens of a vocabulary may follow which."""

from __future__ import annotations

from collections.abc import Sequence

import llguidance

from scheduler.messages import Vocabulary

# Far more than real schemas need: 300 optional properties take over 2,000 items. What reaches one of these
# ends the request, and costs a step about 5 ms.
_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=20_000,
    step_max_items=10_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
_MAX_ERROR_CHARS = 500


def _repeated(letters: str) -> tuple[str, ...]:
    # As often as strings with a short, a longer or no limit still allow.
    return f"[{letters}]{{1,10}}", f"[{letters}]{{1,30}}", f"[{letters}]+"


_CONTROL = r'"\\\x00-\x1F\x7F'
# Tokens that match one of these, each the first that it can, are allowed all at once where a grammar allows
# any text of the kind: words, as in patterns; text without what may begin a call; text in JSON. Others are
# tried one by one.
_SLICES = (
    r"[ \n\r\t]+",
    *_repeated("a-zA-Z0-9 ")[:2],
    *_repeated(r"^<\[{`" + _CONTROL),
    *_repeated("^" + _CONTROL),
)


class GrammarError(ValueError):
    """The grammar cannot be used; the message says why, in llguidance's words."""


class GrammarCompiler:
    """Compiles grammars for one vocabulary.

    ``compile`` may be called from several threads at once and lets other threads run. Making this object does
    not: it holds the interpreter for 0.2 s with 49k tokens.
    """

    def __init__(
        self, vocabulary: Vocabulary, vocab_size: int | None = None, slices: Sequence[str] = _SLICES
    ) -> None:
        """
        Args:
            vocab_size: columns of the logits, if they are more than the tokenizer has tokens.
            slices: regexes of tokens that are often allowed together. They change no mask, only its time.

        Raises:
            GrammarError: the tokenizer is of a kind that is not supported.
        """
        # A model without an end of text needs one all the same; it is never sampled.
        self.eos_token_ids = vocabulary.eos_token_ids or (0,)
        try:
            tokenizer = llguidance.LLTokenizer(
                vocabulary.tokenizer, eos_token=list(self.eos_token_ids), slices=list(slices)
            )
            if vocab_size is not None and vocab_size > tokenizer.vocab_size:
                tokenizer = llguidance.LLTokenizer(
                    vocabulary.tokenizer,
                    n_vocab=vocab_size,
                    eos_token=list(self.eos_token_ids),
                    slices=list(slices),
                )
        except ValueError as error:
            raise GrammarError(_first_line(str(error))) from None
        self._tokenizer = tokenizer

    @property
    def num_mask_words(self) -> int:
        """32-bit words of a mask."""
        return -(-self._tokenizer.vocab_size // 32)

    def compile(self, grammar: str) -> llguidance.LLMatcher:
        """A matcher at the start of the text; its first mask has been computed.

        Raises:
            GrammarError: the grammar is wrong, allows nothing or is too complex.
        """
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise GrammarError(_first_line(matcher.get_error()))
        return matcher


def follow_forced(matcher: llguidance.LLMatcher) -> None:
    """Goes on as far as there is no choice.

    Raises:
        GrammarError: that is too far.
    """
    matcher.consume_tokens(matcher.compute_ff_tokens())
    if matcher.is_error():
        raise GrammarError(_first_line(matcher.get_error()))


def _first_line(error: str) -> str:
    lines = error.strip().splitlines() or ["no reason was given"]
    return lines[0][:_MAX_ERROR_CHARS]
