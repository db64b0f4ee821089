"""Text to token ids and back, for one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from scheduler.messages import Vocabulary
from server.chat_template import ChatTemplate, ChatTemplateError, with_parsed_calls
from server.control_tokens import ControlTokenError, ControlTokens
from server.token_bound import TokenBound
from server.token_bytes import LeadingSpace, TokenBytes, with_plain_spaces
from server.tokenizer_spec import TokenizerError, TokenizerSpec, checked

# With letters, numbers, and characters that few vocabularies have.
_SAMPLE = "A sample: 12 é\n\U0001f642\U000e0041"


class InvalidTextError(ValueError):
    """The text has half a surrogate pair in it, which is no character and has no tokens."""


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a folder in Hugging Face format or of a ``.gguf`` file.

    Blocks for 0.1 to 2 s, the longer the vocabulary. Runs no code that comes with the model, but for its
    chat template, which runs in a sandbox.

    Raises:
        TokenizerError: missing, damaged or of a kind that is not supported; the message says what would work.
    """
    if path.is_dir():
        from server.hf_tokenizer import tokenizer_from_folder

        return Tokenizer(tokenizer_from_folder(path))
    from server.gguf_tokenizer import tokenizer_from_gguf

    return Tokenizer(tokenizer_from_gguf(path))


class Tokenizer:
    """Encodes text and chats, decodes tokens.

    All methods may be called from several threads at once. Encoding releases the interpreter lock, so off
    the event loop it does not delay other requests.

    Attributes:
        vocab_size: token ids are below it.
        eos_token_ids: tokens that end a generation.
        added_token_ids: tokens beside those of the vocabulary proper, by name: control tokens and others.
        special_token_ids, special_token_names: control tokens: no text of their own, left out of what a
            client sees.
        named_special_tokens: what chat templates see, such as ``{"bos_token": "<s>"}``.
        chat_template: None if the model has none.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        """Raises TokenizerError if the way it decodes or its chat template is not supported."""
        self._backend = spec.backend
        added = spec.backend.get_added_tokens_decoder()
        special = {token_id: token for token_id, token in added.items() if token.special}
        self.bos_token_id = spec.bos_token_id
        self.eos_token_ids = spec.eos_token_ids
        self.added_token_ids = {token.content: token_id for token_id, token in added.items()}
        self.special_token_ids = frozenset(special)
        self._special_names = {token.content: token_id for token_id, token in special.items()}
        self.special_token_names = frozenset(self._special_names)
        self.vocab_size = max(spec.backend.get_vocab_size(with_added_tokens=True), *(i + 1 for i in added), 0)
        # Parts that contradict each other are found when they are used for the first time: now, then.
        checked(lambda: spec.backend.encode_batch_fast([_SAMPLE]), "The tokenizer fails on a plain text")
        self._bytes = TokenBytes(spec.backend)
        # By the control tokens that are shown all the same; few sets are ever asked for.
        self._visible_bytes = {frozenset[int](): self._bytes.hiding(self.special_token_ids)}
        self._control_tokens = ControlTokens(spec.backend)
        self.named_special_tokens = dict(spec.named_special_tokens)
        self.chat_template: ChatTemplate | None = None
        if spec.chat_templates:
            try:
                self.chat_template = ChatTemplate(spec.chat_templates, spec.named_special_tokens)
            except ChatTemplateError as error:
                raise TokenizerError(str(error)) from None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Control tokens written out in the text are taken as such.

        Args:
            add_special_tokens: put BOS (and whatever else the model wants) around it.

        Raises:
            InvalidTextError: the text has lone surrogates.
        """
        return self.encode_batch((text,), add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """``encode`` for several texts at once, in parallel."""
        _check_texts(texts)
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continues_final: bool = False,
        render: Callable[..., str] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation, written out by the chat template.

        Control tokens that clients write into messages or tools stay plain text: only those that the
        template itself writes become control tokens.

        Args:
            messages: plain JSON values, as in OpenAI's API.
            continues_final: as for ``ChatTemplate.render``.
            render: takes the place of the template's.
            variables: further names that the template reads (``ChatTemplate.variables``).

        Raises:
            ChatTemplateError: there is no template, or it does not take these messages.
            InvalidTextError: lone surrogates in the messages.
        """
        if render is None:
            if self.chat_template is None:
                raise ChatTemplateError(
                    "The model has no chat template: use /v1/completions, or serve a model that has one."
                )
            render = self.chat_template.render
        try:
            # First of all, since JSON's escapes would hide control tokens from the shield.
            messages = [with_parsed_calls(message) for message in messages]
            shield, (messages, tools, variables) = self._control_tokens.shield((messages, tools, variables))
            text = render(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continues_final=continues_final,
                **variables,
            )
            if shield is None:
                return self.encode(text, add_special_tokens=False)
            return self._control_tokens.encode(text, shield)
        except UnicodeEncodeError as error:
            raise _invalid_text(error) from None
        except ControlTokenError as error:
            raise ChatTemplateError(str(error)) from None
        except RecursionError:
            raise ChatTemplateError("The messages or tools are nested too deeply.") from None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence.

        Bytes that are no UTF-8 become U+FFFD; ids out of the vocabulary nothing.
        """
        table = self.token_bytes_table(skip_special_tokens=skip_special_tokens)
        match table.leading_space:
            case LeadingSpace.KEPT:
                data = b"".join([table[token] for token in token_ids])
            case LeadingSpace.ONE_REMOVED:
                data = b"".join([table[token] for token in token_ids]).removeprefix(b" ")
            case LeadingSpace.REMOVED_FROM_FIRST_TOKEN:
                hidden = self.special_token_ids if skip_special_tokens else ()
                shown = [token for token in token_ids if token not in hidden]
                first = table.without_leading_space(shown[0]) if shown else b""
                data = first + b"".join([table[token] for token in shown[1:]])
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token: maybe only part of a character. Control tokens give their name."""
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """The bytes of one token as text, with U+FFFD for what is not a whole character."""
        return self._bytes[token_id].decode("utf-8", "replace")

    def token_name(self, token_id: int) -> str:
        """What the vocabulary calls a token, such as ``Ġthe``; nothing for an id that it lacks."""
        return self._backend.id_to_token(token_id) or ""

    def control_token_ids(self, names: Iterable[str]) -> frozenset[int]:
        """Those of the names that are control tokens of this model."""
        return frozenset(self._special_names[name] for name in names if name in self._special_names)

    def token_bytes_table(
        self, *, skip_special_tokens: bool, shown: frozenset[int] = frozenset()
    ) -> TokenBytes:
        """``token_bytes`` of all tokens; with ``skip_special_tokens``, control tokens have no bytes, unless
        they are among ``shown``.
        """
        if not skip_special_tokens:
            return self._bytes
        table = self._visible_bytes.get(shown)
        if table is None:
            table = self._visible_bytes[shown] = self._bytes.hiding(self.special_token_ids - shown)
        return table

    def min_tokens_for(self, text: str) -> int:
        """A number of tokens that ``encode(text, add_special_tokens=False)`` certainly reaches; maybe 0.

        About a hundredth of the time of encoding. Refuses a hopelessly long prompt before tokenizing it.
        The first call reads the vocabulary (0.1 s for 50k tokens), so it belongs off the event loop.
        """
        return self._bound.at_least(text)

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token. The first call reads the vocabulary, as that of ``min_tokens_for``."""
        return max(len(self._bytes[token_id]) for token_id in range(self.vocab_size))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What grammars have to know of the tokens. Takes 20 ms for 49k tokens."""
        return Vocabulary(with_plain_spaces(self._backend), self.eos_token_ids)

    @cached_property
    def _bound(self) -> TokenBound:
        return TokenBound(self._backend, self._bytes, self.vocab_size)


def _check_texts(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _invalid_text(error) from None


def _invalid_text(error: UnicodeEncodeError) -> InvalidTextError:
    return InvalidTextError(
        f"The text has a lone surrogate (U+{ord(error.object[error.start]):04X}) at position {error.start}: "
        "send whole characters."
    )
