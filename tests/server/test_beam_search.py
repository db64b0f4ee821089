"""Beam search against all texts that there are, and against one written in another way."""

from __future__ import annotations

import asyncio
import itertools
import math
import time

import pytest

from scheduler.hashing_executor import EMPTY_PREFIX, HashingExecutor, extend_hash
from scheduler.messages import EngineOutput, FinishReason, Request, SamplingParams, TokenLogprobs
from server.admission import Admission
from server.beam_search import BeamSearch
from server.beam_streams import BeamStreams
from server.config import ServerConfig
from server.errors import AbortedError, DeadlineError
from tests.server.in_process_engine import HashingEngine

Text = tuple[int, ...]
Found = list[tuple[Text, float]]


def weights(prefix_hash: int, vocab_size: int) -> list[float]:
    """The logprob of each next token: a model that knows all tokens before."""
    drawn = [1 + extend_hash(prefix_hash, 77 + token_id) % 10_000 for token_id in range(vocab_size)]
    return [math.log(weight / sum(drawn)) for weight in drawn]


def describe(prefix_hash: int, token_id: int, num_top: int, vocab_size: int) -> TokenLogprobs:
    """What the hashing executor tells of a token, with the model above."""
    known = weights(prefix_hash, vocab_size)
    order = sorted(range(vocab_size), key=lambda token: -known[token])
    top = tuple((token, known[token]) for token in order[:num_top])
    return TokenLogprobs(token_id, known[token_id], 1 + order.index(token_id), top)


@pytest.fixture(autouse=True)
def _model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.hashing_executor.describe", describe)


def logprobs_after(text: Text, vocab_size: int) -> list[float]:
    prefix_hash = EMPTY_PREFIX
    for token_id in text:
        prefix_hash = extend_hash(prefix_hash, token_id)
    return weights(prefix_hash, vocab_size)


def request(prompt: Text, max_tokens: int, stop: Text, number: int, arrival: float = 0.0) -> Request:
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop, logprobs=1, seed=number)
    return Request(f"r-{number}", prompt, params, arrival_time=arrival)


async def search(
    executor: HashingExecutor, prompts: list[Text], width: int, penalty: float, max_tokens: int, stop: Text
) -> tuple[list[Found], HashingEngine]:
    """The texts found for each prompt, without stop tokens, and their logprobs."""
    engine = HashingEngine(executor)
    requests = [
        request(prompt, max_tokens, stop, index * width + place)
        for index, prompt in enumerate(prompts)
        for place in range(width)
    ]
    admission = Admission(ServerConfig(), engine)
    answers: dict[int, EngineOutput] = {}
    with admission.admit(requests):
        async for batch in BeamStreams(engine, admission, requests, width, penalty).batches():
            answers |= dict(batch)
    engine.core.check_invariants()
    assert sorted(answers) == list(range(len(requests)))
    assert [answers[index].request_id for index in sorted(answers)] == [r.request_id for r in requests]
    assert engine.core.stats.kv_cache_usage == 0.0
    found = []
    for index in sorted(answers):
        output = answers[index]
        assert output.logprobs is not None
        assert [record.token_id for record in output.logprobs] == list(output.token_ids)
        assert all(len(record.top) == 1 for record in output.logprobs)
        is_stopped = output.finish_reason is FinishReason.STOP
        assert is_stopped == (output.token_ids[-1] in stop)
        text = output.token_ids[:-1] if is_stopped else output.token_ids
        found.append((text, sum(record.logprob for record in output.logprobs)))
    return [found[first : first + width] for first in range(0, len(found), width)], engine


def every_text(prompt: Text, vocab_size: int, max_tokens: int, stop: Text) -> Found:
    """All texts that can be generated, with their logprobs."""
    texts: Found = []
    for length in range(1, max_tokens + 1):
        for text in itertools.product(range(vocab_size), repeat=length):
            if any(token in stop for token in text[:-1]) or (text[-1] not in stop and length < max_tokens):
                continue
            logprob = sum(
                logprobs_after(prompt + text[:place], vocab_size)[text[place]] for place in range(length)
            )
            texts.append((text[:-1] if text[-1] in stop else text, logprob))
    return texts


def pruned(prompt: Text, vocab_size: int, width: int, penalty: float, max_tokens: int, stop: Text) -> Found:
    """Beam search as vLLM describes it, which goes on to the last token whatever has been found."""

    def score(entry: tuple[Text, float]) -> float:
        return entry[1] / math.pow(len(prompt) + len(entry[0]), penalty)

    beams: Found = [((), 0.0)]
    complete: Found = []
    for _ in range(max_tokens):
        longer: Found = []
        for text, logprob in beams:
            known = logprobs_after(prompt + text, vocab_size)
            for token in sorted(range(vocab_size), key=lambda token: known[token])[-2 * width :]:
                if token in stop:
                    complete.append((text, logprob + known[token]))
                else:
                    longer.append(((*text, token), logprob + known[token]))
        beams = sorted(longer, key=score)[-width:]
    return sorted(complete + beams, key=score)[: -width - 1 : -1]


def assert_same(found: Found, expected: Found) -> None:
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [logprob for _, logprob in found] == pytest.approx([logprob for _, logprob in expected])


@pytest.mark.parametrize("penalty", [-1.5, 0.0, 1.0, 3.0])
async def test_a_search_that_drops_nothing_finds_the_best_of_all_texts(penalty: float) -> None:
    prompts: list[Text] = [(0, 1, 1, 0, 1), (1,), (0, 0, 1, 1, 0, 1, 0, 1)]
    found, _ = await search(HashingExecutor(64, 4, vocab_size=3), prompts, 10, penalty, 3, (2,))
    for prompt, ours in zip(prompts, found, strict=True):
        texts = every_text(prompt, 3, 3, (2,))
        texts.sort(key=lambda entry: -entry[1] / (len(prompt) + len(entry[0])) ** penalty)
        assert_same(ours, texts[:10])


@pytest.mark.parametrize("max_in_flight", [1, 2])
@pytest.mark.parametrize(
    ("width", "penalty"), [(1, 1.0), (2, 0.0), (3, 1.0), (3, -2.0), (4, 2.5), (1, 4.0), (2, 6.0)]
)
async def test_it_keeps_the_best_at_each_step(width: int, penalty: float, max_in_flight: int) -> None:
    prompts: list[Text] = [tuple(i * 7 % 9 for i in range(1, length)) for length in (2, 6, 13)]
    for stop in ((8,), (3, 5), ()):
        executor = HashingExecutor(48, 4, vocab_size=9, max_num_seqs=6, max_in_flight=max_in_flight)
        found, _ = await search(executor, prompts, width, penalty, 9, stop)
        executor.shutdown()
        for prompt, ours in zip(prompts, found, strict=True):
            assert_same(ours, pruned(prompt, 9, width, penalty, 9, stop))


async def test_it_gets_on_in_a_pool_that_is_too_small_for_all_beams() -> None:
    prompts: list[Text] = [tuple(i * k % 7 for i in range(1, 18)) for k in (2, 3, 5)]
    executor = HashingExecutor(12, 4, vocab_size=7, max_num_seqs=3, max_num_batched_tokens=6)
    found, _ = await search(executor, prompts, 4, 1.0, 8, (6,))
    for prompt, ours in zip(prompts, found, strict=True):
        assert_same(ours, pruned(prompt, 7, 4, 1.0, 8, (6,)))


async def test_it_ends_when_nothing_can_get_better() -> None:
    executor = HashingExecutor(256, 4, vocab_size=5)
    [found], engine = await search(executor, [(1, 2, 3)], 2, 1.0, 120, (4,))
    assert_same(found, pruned((1, 2, 3), 5, 2, 1.0, 120, (4,)))
    assert engine.core.stats.steps_total < 100


@pytest.mark.parametrize(
    ("penalty", "steps", "expected"),
    [
        # -1 / 10**4 is better than -1.9 / 11**4, but not than -1.95 / 12**4.
        (4.0, [((9, -1.0), (1, -1.9)), ((2, -0.05), (3, -5.0))], (1, 2)),
        # -0.81 * 11**2 is better than -1 * 10**2, but -0.8 * 12**2 is not.
        (-2.0, [((9, -1.0), (1, -0.8)), ((9, -0.01), (3, -5.0))], (1, 9)),
        (1.0, [((9, -1.0), (1, -2.0))], (9,)),
    ],
)
def test_a_beam_that_can_still_win_goes_on(
    penalty: float, steps: list[tuple[tuple[int, float], ...]], expected: Text
) -> None:
    search = BeamSearch(1, penalty, prompt_length=10, max_tokens=2, stop_token_ids=(9,))
    for top in steps:
        assert len(search.beams) == 1
        search.advance([TokenLogprobs(*top[0], 1, top)])
    assert search.beams == []
    assert [beam.token_ids for beam in search.best()] == [expected]


async def test_beams_share_what_they_have_in_common() -> None:
    prompt = tuple(i * i % 11 for i in range(100))
    _, engine = await search(HashingExecutor(64, 16, vocab_size=11), [prompt], 4, 1.0, 12, ())
    # All of the prompt once; then each of the 4 beams what is not in whole blocks, at every step.
    recomputed = sum(4 * (100 + step - (99 + step) // 16 * 16) for step in range(1, 12))
    assert engine.core.stats.scheduled_tokens_total == 100 + recomputed


async def test_its_time_may_be_over() -> None:
    engine = HashingEngine(HashingExecutor(64, 4, vocab_size=9))
    engine.pause = 0.002
    admission = Admission(ServerConfig(request_timeout=1), engine)
    began = time.monotonic() - 0.95
    requests = [request((1, 2), 100, (), number, arrival=began) for number in range(3)]
    with admission.admit(requests):
        with pytest.raises(DeadlineError):
            async for _ in BeamStreams(engine, admission, requests, 3, 1.0).batches():
                pass
        await asyncio.sleep(0.02)
    assert not engine.core.has_work
    assert admission.num_waiting == 0


@pytest.mark.parametrize("end", ["leave", "abort"])
async def test_a_search_that_nobody_waits_for_ends(end: str) -> None:
    engine = HashingEngine(HashingExecutor(64, 4, vocab_size=9))
    engine.pause = 0.002
    admission = Admission(ServerConfig(), engine)
    requests = [request((1, 2), 100, (), number) for number in range(3)]
    with admission.admit(requests):
        batches = BeamStreams(engine, admission, requests, 3, 1.0).batches()
        waiting = asyncio.ensure_future(anext(batches))
        while engine.core.stats.steps_total < 5:  # noqa: ASYNC110 - between two of them the engine is idle
            await asyncio.sleep(0.002)
        if end == "leave":
            waiting.cancel()
            await asyncio.wait((waiting,))
        else:
            for each in requests:
                admission.fail(each.request_id, AbortedError())
            with pytest.raises(AbortedError):
                await waiting
        await batches.aclose()
    num_steps = engine.core.stats.steps_total
    await asyncio.sleep(0.03)
    assert not engine.core.has_work
    assert engine.core.stats.steps_total <= num_steps + 2
    engine.core.check_invariants()
