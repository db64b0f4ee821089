"""Log probabilities as OpenAI shows them: the chat form, and the older one of text completions."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence
from typing import Any

from scheduler.messages import TokenLogprobs
from server.tokenizer import Tokenizer

# JSON has no minus infinity; this is what vLLM sends for it.
_LEAST = -9999.0


def chat_logprobs(
    records: Iterable[TokenLogprobs], num_top: int, tokenizer: Tokenizer, *, by_id: bool = False
) -> list[dict[str, Any]]:
    """One ``ChatCompletionTokenLogprob`` for each record, with the ``num_top`` most likely tokens.

    Args:
        by_id: tokens are called ``token_id:123``.
    """

    def shown(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        name = _id_name(token_id) if by_id else data.decode("utf-8", "replace")
        return {"token": name, "logprob": max(logprob, _LEAST), "bytes": list(data)}

    return [
        {
            **shown(record.token_id, record.logprob),
            "top_logprobs": [shown(*pair) for pair in record.top[:num_top]],
        }
        for record in records
    ]


def _id_name(token_id: int) -> str:
    """What vLLM calls a token where names are to be unambiguous."""
    return f"token_id:{token_id}"


def prompt_logprobs(
    records: Sequence[TokenLogprobs], num_top: int, tokenizer: Tokenizer
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's form: for each token of a prompt, by id, the token itself and the ``num_top`` most likely ones
    in its place. The first token follows nothing, so that it has no probabilities.
    """

    def shown(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        text = tokenizer.token_text(token_id)
        return {"logprob": max(logprob, _LEAST), "rank": rank, "decoded_token": text}

    return [
        None,
        *(
            {str(record.token_id): shown(record.token_id, record.logprob, record.rank)}
            | {
                str(token_id): shown(token_id, logprob, rank)
                for rank, (token_id, logprob) in enumerate(record.top[:num_top], 1)
            }
            for record in records
        ),
    ]


class CompletionLogprobs:
    """The older form: parallel lists, with the place of each token in the text of the choice.

    Remembers how far the text has come, so that it can be asked piece by piece.
    """

    def __init__(
        self, num_top: int, tokenizer: Tokenizer, *, skip_special_tokens: bool, by_id: bool = False
    ) -> None:
        """``by_id`` calls tokens ``token_id:123``."""
        self._by_id = by_id
        self._num_top = num_top
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def prompt(self, token_ids: Sequence[int], records: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The lists for an echoed prompt. Its first token follows nothing, so that it has no probability."""
        first = self._lists(())
        first["tokens"].append(self._shown(token_ids[0]))
        first["token_logprobs"].append(None)
        first["top_logprobs"].append(None)
        first["text_offset"].append(self._place(token_ids[0]))
        return joined(first, self.generated(records))

    def generated(self, records: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The lists for the next tokens of the text."""
        return self._lists(records)

    def _lists(self, records: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return {
            "tokens": [self._shown(record.token_id) for record in records],
            "token_logprobs": [max(record.logprob, _LEAST) for record in records],
            "top_logprobs": [self._top(record) for record in records],
            "text_offset": [self._place(record.token_id) for record in records],
        }

    def _top(self, record: TokenLogprobs) -> dict[str, float]:
        top = {
            self._shown(token_id): max(logprob, _LEAST) for token_id, logprob in record.top[: self._num_top]
        }
        top.setdefault(self._shown(record.token_id), max(record.logprob, _LEAST))
        return top

    def _shown(self, token_id: int) -> str:
        """A token that is only a part of a character is shown as OpenAI does: ``bytes:\\xe2\\x82``."""
        if self._by_id:
            return _id_name(token_id)
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _place(self, token_id: int) -> int:
        place = self._offset
        if token_id not in self._hidden:
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return place


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two sets of lists as one."""
    return {name: first[name] + second[name] for name in first}
