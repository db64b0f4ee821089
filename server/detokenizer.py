"""Turns the tokens of one sequence into text while they come in."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence

from server.stop_strings import StopStringMatcher
from server.token_bytes import LeadingSpace
from server.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Text of one sequence, piece by piece, in time linear in the tokens.

    What ``push`` and ``finish`` return, put together, is the text of the whole sequence:
    ``tokenizer.decode`` of its tokens, up to the stop string if one was found. A piece never ends inside a
    UTF-8 character and never contains the start of what may become a stop string.

    Attributes:
        stopped_by: the stop string that ended the text, or None.
        num_tokens: tokens taken so far. After a stop, those up to the one that completed it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
        stop: Sequence[str] = (),
        include_stop: bool = False,
    ) -> None:
        """
        Args:
            prompt_token_ids: the text before, if any: a word after it keeps the space that it would lose at
                the start of a text.
            skip_special_tokens: leave control tokens out of the text, but for those in ``shown``.
            stop: strings that end the text, none of them empty.
            include_stop: whether the text ends with the stop string or before it.
        """
        self._table = tokenizer.token_bytes_table(skip_special_tokens=skip_special_tokens, shown=shown)
        self._leading_space = self._table.leading_space
        if self._leading_space is not LeadingSpace.KEPT and any(
            self._table[token] for token in prompt_token_ids
        ):
            self._leading_space = LeadingSpace.KEPT
        hidden = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._hidden = hidden - shown if shown else hidden  # one for all, as long as nothing is shown
        self._matcher = StopStringMatcher(stop) if stop else None
        self._include_stop = include_stop
        self._bytes = b""  # the start of a character
        self._held = ""  # the possible start of a stop string
        self._pieces: list[str] = []
        self._is_finished = False
        self.stopped_by: str | None = None
        self.num_tokens = 0

    @property
    def text(self) -> str:
        """All text returned so far."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens and returns the text that is safe to send, often one word, maybe nothing."""
        if self._is_finished:
            return ""
        if self._matcher is None:
            self.num_tokens += len(token_ids)
            piece = self._decode(token_ids)
        else:
            pieces = []
            for token in token_ids:
                self.num_tokens += 1
                pieces.append(self._until_stop(self._decode((token,))))
                if self.stopped_by is not None:
                    break
            piece = "".join(pieces)
        if piece:
            self._pieces.append(piece)
        return piece

    def finish(self) -> str:
        """The rest of the text, once no more tokens come: an unfinished character becomes U+FFFD."""
        if self._is_finished:
            return ""
        rest, self._bytes = self._bytes.decode("utf-8", "replace"), b""
        if self._matcher is not None:
            rest = self._until_stop(rest)
            if not self._is_finished:
                rest += self._held
                self._held = ""
        self._is_finished = True
        if rest:
            self._pieces.append(rest)
        return rest

    def _decode(self, token_ids: Sequence[int]) -> str:
        if self._leading_space is not LeadingSpace.KEPT:
            data = self._start(token_ids)
        else:
            table = self._table
            data = b"".join([table[token] for token in token_ids])
        if self._bytes:
            data = self._bytes + data
        if data.isascii():
            self._bytes = b""
            return data.decode("ascii")
        text, used = utf_8_decode(data, "replace", False)
        self._bytes = data[used:]
        return text

    def _start(self, token_ids: Sequence[int]) -> bytes:
        """Bytes of tokens while the text has not begun: its leading space goes."""
        data = b""
        for position, token in enumerate(token_ids):
            if token in self._hidden:
                continue
            if self._leading_space is LeadingSpace.REMOVED_FROM_FIRST_TOKEN:
                data = self._table.without_leading_space(token)
            elif not (data := self._table[token]):
                continue
            else:
                data = data.removeprefix(b" ")
            self._leading_space = LeadingSpace.KEPT
            return data + b"".join([self._table[later] for later in token_ids[position + 1 :]])
        return data

    def _until_stop(self, text: str) -> str:
        """What may be sent of the held text and ``text``; notes a stop string that it completes."""
        assert self._matcher is not None
        found = self._matcher.feed(text)
        if found is None:
            if not self._held and not self._matcher.num_held:
                return text
            text = self._held + text
            cut = len(text) - self._matcher.num_held
            self._held = text[cut:]
            return text[:cut]
        end, self.stopped_by = found
        text = self._held + text[:end]
        self._held = ""
        self._is_finished = True
        return text if self._include_stop else text[: len(text) - len(self.stopped_by)]
