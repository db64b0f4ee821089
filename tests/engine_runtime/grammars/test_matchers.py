"""Grammars on the default model's vocabulary, token by token."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_runtime.grammars.compiler import GrammarCompiler, GrammarError, follow_forced
from engine_runtime.grammars.matchers import GrammarMatchers
from scheduler.messages import Request, SamplingParams, ScheduledSequence, Vocabulary
from server.grammars import from_choices, from_grammar, from_json_schema, from_regex
from server.hf_tokenizer import tokenizer_from_folder
from server.tokenizer import Tokenizer, load_tokenizer
from tests.server.text_fixtures import FIXTURES

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer.vocabulary)


class Follower:
    """``GrammarMatchers`` with the waiting and the bits taken care of."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size or tokenizer.vocab_size
        self._prepared = threading.Event()
        self.matchers = GrammarMatchers(self.vocab_size, self._prepared.set)
        self.matchers.learn(tokenizer.vocabulary)

    def begin(self, grammar: str, name: str = "r", generated: tuple[int, ...] = (), **params: Any) -> None:
        params = {"stop_token_ids": self.tokenizer.eos_token_ids, "max_tokens": 100, **params}
        self._prepared.clear()
        self.matchers.prepare(
            Request(name, (1,), SamplingParams(**params), generated_token_ids=generated, grammar=grammar)
        )
        while not (taken := self.matchers.take_prepared()):
            assert self._prepared.wait(10)
        ((request, error),) = taken
        assert (request.request_id, error) == (name, None)

    def allowed(self, *names: str) -> list[list[int]]:
        names = names or ("r",)
        masks = self.matchers.masks([ScheduledSequence(name, 0, 1, (), True) for name in names])
        assert masks is not None
        assert masks.request_ids == names
        rows = np.frombuffer(masks.bits, np.uint8).reshape(len(names), -1)
        bits = np.unpackbits(rows, axis=1, bitorder="little")[:, : self.vocab_size]
        return [np.flatnonzero(row).tolist() for row in bits]

    def write(self, choose: Callable[[list[int]], int], max_tokens: int = 200) -> tuple[list[int], bool]:
        """Tokens of a text, forced ones included, and whether it came to its end."""
        taken: list[int] = []
        while len(taken) < max_tokens:
            taken.append(choose(self.allowed()[0]))
            accepted = self.matchers.accept("r", taken[-1])
            assert accepted.error is None, accepted.error
            taken += accepted.forced_token_ids
            if accepted.has_ended:
                return taken, True
        return taken, False


def smallest_of_three(rng: random.Random) -> Callable[[list[int]], int]:
    """Chooses at random, but so that numbers do not go on for ever: what ends a text has a small id."""
    return lambda allowed: min(rng.choices(allowed, k=3))


@pytest.fixture
def follower(tokenizer: Tokenizer) -> Iterator[Follower]:
    follower = Follower(tokenizer)
    yield follower
    follower.matchers.shutdown()


@pytest.mark.parametrize("params", [{}, {"logprobs": 1}, {"repetition_penalty": 1.1}, {"stop_token_ids": ()}])
def test_random_tokens_make_valid_json(follower: Follower, params: dict[str, Any]) -> None:
    grammar = from_json_schema(PERSON, whitespace="")
    for seed in range(8):
        rng = random.Random(seed)
        follower.begin(grammar, **params)
        taken, has_ended = follower.write(smallest_of_three(rng))
        assert has_ended
        assert taken[-1] in follower.tokenizer.eos_token_ids
        person = json.loads(follower.tokenizer.decode(taken[:-1], skip_special_tokens=False))
        assert set(person) == {"name", "age"}
        assert len(person["name"]) <= 5
        assert isinstance(person["age"], int)
        assert not follower.matchers.forget("r")


def test_tokens_without_alternative_are_forced(follower: Follower) -> None:
    grammar = from_json_schema(PERSON, whitespace="")
    follower.begin(grammar)
    (first,) = follower.tokenizer.encode('{"', add_special_tokens=False)
    forced = follower.matchers.accept("r", first).forced_token_ids
    assert follower.tokenizer.decode(forced) == "name"
    follower.begin(grammar, "reporting", logprobs=0)
    assert follower.matchers.accept("reporting", first).forced_token_ids == ()


def test_no_more_is_forced_than_may_be_generated(follower: Follower) -> None:
    grammar = from_json_schema({"const": "word " * 1000}, whitespace="")
    for max_tokens, generated in ((10, ()), (30, tuple(follower.tokenizer.encode('"word word')))):
        follower.begin(grammar, max_tokens=max_tokens, generated=generated)
        ((first, *_),) = follower.allowed()
        accepted = follower.matchers.accept("r", first)
        assert len(accepted.forced_token_ids) == max_tokens - len(generated) - 1
        assert (accepted.has_ended, accepted.error) == (False, None)
        follower.matchers.forget("r")


@pytest.mark.parametrize(
    "grammar",
    [
        from_json_schema({"type": "array", "minItems": 10**9, "items": {"type": "null"}}, whitespace=""),
        from_grammar('start: "a"~1000000000'),
        from_grammar('start: "a" start'),
        from_regex("a{1000000}"),
    ],
)
def test_forced_text_without_an_end_is_refused(compiler: GrammarCompiler, grammar: str) -> None:
    began = time.thread_time()
    with pytest.raises(GrammarError, match=r"[tT]oo many"):
        follow_forced(compiler.compile(grammar))
    assert time.thread_time() - began < 1.0


@pytest.mark.parametrize("num_cores", [1, 8])
def test_sequences_do_not_disturb_each_other(
    tokenizer: Tokenizer, num_cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(num_cores)))
    follower = Follower(tokenizer)
    names = [f"r{number}" for number in range(9)]
    for name in names:
        follower.begin(from_regex("a[xy]|b[uv]|c"), name)
    (a,), (b,) = (follower.tokenizer.encode(letter, add_special_tokens=False) for letter in "ab")
    follower.matchers.accept("r3", a)
    follower.matchers.accept("r7", b)
    allowed = follower.allowed(*names)
    texts = [{follower.tokenizer.token_text(token) for token in row} for row in allowed]
    assert texts[3] == {"x", "y"}
    assert texts[7] == {"u", "v"}
    assert texts[0] == texts[8]
    assert {"a", "b", "c"} <= texts[0] <= {"a", "ax", "ay", "b", "bu", "bv", "c"}
    assert allowed[3] == follower.allowed("r3")[0]
    follower.matchers.shutdown()


def test_a_grammar_goes_on_behind_what_was_generated(follower: Follower) -> None:
    tokens = tuple(follower.tokenizer.encode('{"name":"Bo', add_special_tokens=False))
    follower.begin(from_json_schema(PERSON, whitespace=""), generated=tokens)
    rng = random.Random(1)
    rest, has_ended = follower.write(smallest_of_three(rng))
    assert has_ended
    assert json.loads(follower.tokenizer.decode([*tokens, *rest[:-1]]))["name"].startswith("Bo")


def test_stop_tokens_wait_for_min_tokens_where_the_grammar_can_go_on(follower: Follower) -> None:
    eos = set(follower.tokenizer.eos_token_ids)
    (a,) = follower.tokenizer.encode("a", add_special_tokens=False)
    follower.begin(from_regex("a{1,4}"), min_tokens=3, logprobs=0)
    for ends in (False, False, False, True):
        allowed = follower.allowed()[0]
        assert bool(set(allowed) & eos) == ends
        follower.matchers.accept("r", a)
    assert set(follower.allowed()[0]) == eos  # nothing else is left


def test_an_ignored_end_comes_only_where_nothing_else_can(follower: Follower) -> None:
    eos = set(follower.tokenizer.eos_token_ids)
    (a,) = follower.tokenizer.encode("a", add_special_tokens=False)
    follower.begin(from_regex("a{1,2}"), stop_token_ids=(), logprobs=0)
    for _ in range(2):
        assert not set(follower.allowed()[0]) & eos
        follower.matchers.accept("r", a)
    end = follower.allowed()[0]
    assert set(end) == eos
    assert follower.matchers.accept("r", end[0]).has_ended


def test_masks_cover_columns_of_logits_that_are_no_tokens(tokenizer: Tokenizer) -> None:
    follower = Follower(tokenizer, tokenizer.vocab_size + 100)
    follower.begin(from_regex("[^a]*"))
    assert max(follower.allowed()[0]) < tokenizer.vocab_size
    follower.matchers.shutdown()


def test_many_grammars_are_not_all_remembered(follower: Follower) -> None:
    for number in range(150):
        follower.begin(from_regex(f"x{{{number + 1}}}"))
        follower.matchers.forget("r")
    assert len(follower.matchers._compiled) < 100


def test_a_request_that_is_forgotten_does_not_come_back(follower: Follower) -> None:
    params = SamplingParams()
    follower.matchers.prepare(Request("gone", (1,), params, grammar=from_regex("a")))
    assert follower.matchers.forget("gone")
    follower.begin(from_regex("b"))  # asserts that it is the only one
    assert follower.matchers.masks([ScheduledSequence("gone", 0, 1, (), True)]) is None


def test_without_a_vocabulary_there_are_no_grammars(tokenizer: Tokenizer) -> None:
    woken = threading.Event()
    matchers = GrammarMatchers(tokenizer.vocab_size, woken.set)
    matchers.prepare(Request("r", (1,), SamplingParams(), grammar=from_regex("a")))
    assert woken.wait(5)
    ((_, error),) = matchers.take_prepared()
    assert "vocabulary" in (error or "")
    matchers.shutdown()


@pytest.mark.parametrize(
    ("grammar", "texts", "wrong"),
    [
        (from_regex(r"^\d{3}/[a-z]$"), ["123/x"], ["12/x", "1234", "١٢٣/x"]),
        (
            from_choices(["yes", "no", "a.b", "x/y", "(", "é\n"]),
            ["yes", "a.b", "x/y", "(", "é\n"],
            ["axb", "y"],
        ),
        (from_grammar('start: "a" b+\nb: "x" | "y"'), ["ax", "ayx"], ["a", "xa"]),
        (from_grammar('root ::= "a" [0-9]+ "b"'), ["a1b", "a22b"], ["ab"]),
        (from_json_schema({"enum": ["a", 1]}), ['"a"', "1"], ["2"]),
        (from_json_schema(True), ["[1, {}]", "null"], ["nul"]),
        (from_json_schema({"type": "object"}), ['{"a": [1,\n  2]}', "{}"], ["[]", '{"a"}', '{"a":\n\n\n1}']),
    ],
)
def test_texts_that_follow_a_grammar(
    compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: str, texts: list[str], wrong: list[str]
) -> None:
    def is_complete(text: str) -> bool:
        matcher = compiler.compile(grammar)
        return all(
            matcher.consume_token(token) for token in tokenizer.encode(text, add_special_tokens=False)
        ) and bool(matcher.is_accepting() or matcher.is_stopped())

    for text in texts:
        assert is_complete(text), text
    for text in wrong:
        assert not is_complete(text), text


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (from_json_schema({"type": "object"}), '{"a b": "some <b>words</b>, [1] and `x`\\n"}'),
        (from_json_schema({"type": "string", "maxLength": 25}), '"a few characters, éà"'),
        (from_json_schema({"type": "string", "pattern": "^[a-z 0-9]{1,20}$"}), '"lower case 0 1 2"'),
        (from_regex(r"[^<]*<b>(.|\n)*"), "some text and {a} b<b>more <b>\n text"),
    ],
)
def test_slices_change_no_mask(
    compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: str, text: str
) -> None:
    plain = GrammarCompiler(tokenizer.vocabulary, slices=()).compile(grammar)
    sliced = compiler.compile(grammar)
    for token in tokenizer.encode(text, add_special_tokens=False):
        assert sliced.compute_bitmask() == plain.compute_bitmask()
        assert sliced.consume_token(token)
        assert plain.consume_token(token)
    assert sliced.compute_bitmask() == plain.compute_bitmask()


@pytest.mark.parametrize(
    "grammar", [from_regex("(a"), from_grammar("start: nobody"), from_json_schema(False)]
)
def test_wrong_grammars_are_refused(compiler: GrammarCompiler, grammar: str) -> None:
    with pytest.raises(GrammarError) as caught:
        compiler.compile(grammar)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["byte_level", "sentencepiece", "metaspace"])
def test_tokens_have_the_bytes_that_the_detokenizer_gives_them(folder: str) -> None:
    tokenizer = Tokenizer(tokenizer_from_folder(FIXTURES / folder))
    tokens = GrammarCompiler(tokenizer.vocabulary)._tokenizer
    assert tokens.vocab_size == tokenizer.vocab_size
    for token_id in range(tokenizer.vocab_size):
        # The byte 0xFF is in no text, and stands for something else in llguidance.
        expected = tokenizer.token_bytes(token_id).replace(b"\xff", b"")
        assert tokens.decode_bytes([token_id]) == expected, token_id


def test_a_vocabulary_without_an_end_of_text(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(Vocabulary(tokenizer.vocabulary.tokenizer, ()))
    assert compiler.eos_token_ids == (0,)
    compiler.compile(from_regex("a"))
