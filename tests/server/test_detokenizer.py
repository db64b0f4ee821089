"""Incremental decoding: the stream is the whole text, however it is cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.detokenizer import IncrementalDetokenizer
from server.gguf_tokenizer import tokenizer_from_metadata
from server.tokenizer import Tokenizer, load_tokenizer
from tests.server.text_fixtures import FIXTURES, read_fixture, sentencepiece_metadata


def load(name: str) -> Tokenizer:
    match name:
        case "gguf_with_space" | "gguf_without_space":
            prefix = name == "gguf_with_space"
            return Tokenizer(tokenizer_from_metadata(sentencepiece_metadata(add_space_prefix=prefix)))
        case _:
            return load_tokenizer(FIXTURES / name)


TOKENIZERS = {
    name: load(name)
    for name in ("byte_level", "sentencepiece", "metaspace", "gguf_with_space", "gguf_without_space")
}
TEXTS = read_fixture("texts.json")


@st.composite
def sequences(draw: st.DrawFn) -> tuple[Tokenizer, list[int], list[list[int]]]:
    """A tokenizer, and token ids in pieces: random ones, encoded texts, ids outside the vocabulary."""
    tokenizer = TOKENIZERS[draw(st.sampled_from(sorted(TOKENIZERS)))]
    ids: list[int] = []
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            ids += draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=8))
        else:
            encoded = tokenizer.encode(draw(st.sampled_from(TEXTS)))
            start = draw(st.integers(0, len(encoded)))
            ids += encoded[start : start + 12]
    pieces = []
    rest = ids
    while rest:
        size = draw(st.integers(1, 4))
        pieces.append(rest[:size])
        rest = rest[size:]
    return tokenizer, ids, pieces


@settings(deadline=None)
@given(case=sequences(), skip=st.booleans())
def test_the_stream_is_the_decoded_sequence(
    case: tuple[Tokenizer, list[int], list[list[int]]], skip: bool
) -> None:
    tokenizer, ids, pieces = case
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    sent = [detokenizer.push(piece) for piece in pieces]
    so_far = "".join(sent)
    assert detokenizer.text == so_far
    sent.append(detokenizer.finish())
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(sent) == detokenizer.text == whole
    assert detokenizer.num_tokens == len(ids)
    # Only the unfinished character at the very end may have been held back.
    assert len(whole) - len(so_far) <= 3


def first_stop(text: str, stop: Sequence[str]) -> str | None:
    """The text before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        if found := [s for s in stop if text[:end].endswith(s)]:
            return text[: end - len(max(found, key=len))]
    return None


@settings(deadline=None)
@given(case=sequences(), data=st.data())
def test_stop_strings_cut_the_text_and_never_leak(
    case: tuple[Tokenizer, list[int], list[list[int]]], data: st.DataObject
) -> None:
    tokenizer, ids, pieces = case
    whole = tokenizer.decode(ids)
    stop = data.draw(st.lists(st.text("ab <\n", min_size=1, max_size=3), min_size=1, max_size=3))
    if len(whole) > 2:
        start = data.draw(st.integers(0, len(whole) - 2))
        stop.append(whole[start : start + data.draw(st.integers(1, 6))])
    detokenizer, unstopped = IncrementalDetokenizer(tokenizer, stop=stop), IncrementalDetokenizer(tokenizer)
    sent = known = ""
    for piece in pieces:
        sent += detokenizer.push(piece)
        known += unstopped.push(piece)
        if detokenizer.stopped_by is None:
            # Nothing was sent that may yet turn out to belong to a stop string, and nothing else is held
            # back.
            held = max(n for s in stop for n in range(len(s)) if known.endswith(s[:n]))
            assert sent == known[: len(known) - held]
    sent += detokenizer.finish()
    expected = first_stop(whole, stop)
    assert sent == detokenizer.text == (whole if expected is None else expected)
    assert (detokenizer.stopped_by is not None) == (expected is not None)
    if expected is not None:
        assert whole.startswith(sent + str(detokenizer.stopped_by))
        assert detokenizer.push([5]) == detokenizer.finish() == ""
        # The tokens counted are exactly those that the stop string needed (an unfinished character at the end
        # becomes text in finish only).
        before = tokenizer.decode(ids[: detokenizer.num_tokens - 1]).rstrip("\ufffd")
        assert first_stop(before, stop) is None


def test_include_stop_keeps_the_stop_string() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("one two three")
    for include, expected in ((False, "one "), (True, "one two")):
        detokenizer = IncrementalDetokenizer(tokenizer, stop=["two"], include_stop=include)
        assert detokenizer.push(ids) + detokenizer.finish() == expected
        assert detokenizer.stopped_by == "two"


def test_of_two_stop_strings_that_end_together_the_longer_one_counts() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["d", "cd", "bcd", "abcde"])
    assert detokenizer.push(tokenizer.encode("xabcdef")) == "xa"
    assert detokenizer.stopped_by == "bcd"


def test_a_stop_string_across_many_tokens_is_held_back_until_it_fails() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    letters = [tokenizer.encode(letter)[0] for letter in "[END!x"]
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["[END]"])
    assert [detokenizer.push([token]) for token in letters] == ["", "", "", "", "[END!", "x"]


def test_a_stop_string_may_be_in_what_only_finish_knows() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    half = tokenizer.encode("😀")[:1]
    assert tokenizer.token_bytes(half[0]) != "😀".encode()
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["\ufffd"])
    assert detokenizer.push(half) == ""
    assert detokenizer.finish() == ""
    assert detokenizer.stopped_by == "\ufffd"


def test_a_character_is_sent_when_it_is_whole() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = [tokenizer.encode("é😀")[0]] if len(tokenizer.encode("é😀")) == 1 else tokenizer.encode("é😀")
    detokenizer = IncrementalDetokenizer(tokenizer)
    sent = [detokenizer.push([token]) for token in ids]
    assert "".join(sent) == "é😀"
    assert all(piece in ("", "é", "😀", "é😀") for piece in sent)
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("name", ["sentencepiece", "metaspace", "gguf_with_space"])
def test_the_space_before_the_first_word_depends_on_the_prompt(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(" the", add_special_tokens=False)
    word = [token for token in ids if tokenizer.token_text(token) == " the"]
    assert word
    at_start = IncrementalDetokenizer(tokenizer)
    assert at_start.push(word) == "the"
    after_prompt = IncrementalDetokenizer(tokenizer, tokenizer.encode("of"))
    assert after_prompt.push(word) == " the"
    # A prompt of control tokens only has no text.
    after_bos = IncrementalDetokenizer(tokenizer, [tokenizer.bos_token_id or 0])
    assert after_bos.push(word) == "the"
