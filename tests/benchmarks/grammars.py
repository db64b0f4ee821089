"""What grammars cost: ``python -m tests.benchmarks.grammars`` (``--only masks`` or ``--only steps``).

Masks: a vocabulary of 128k tokens, the default model's 49k and made-up words; JSON texts for a few schemas
go through ``GrammarMatchers`` token by token, alone and 32 at once, and each mask is timed. Steps: the
default model on the CPU, 32 sequences at once, free and with grammars that never end.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from typing import Any

from engine_runtime.factory import RuntimeConfig, create_executor
from engine_runtime.grammars.compiler import GrammarCompiler
from engine_runtime.grammars.matchers import GrammarMatchers
from scheduler.engine_core import EngineCore
from scheduler.messages import Request, SamplingParams, ScheduledSequence, Vocabulary
from server.bench.random_prompts import distinct_prompts
from server.grammars import Tag, from_grammar, from_json_schema, from_regex, from_tags
from server.model_source import fetch_default_model
from server.tokenizer import Tokenizer, load_tokenizer
from tests.benchmarks.figures import machine

VOCAB_SIZE = 128_256
ROWS = 32
_STRING = {"type": "string"}
PERSON = {
    "type": "object",
    "properties": {
        "name": _STRING,
        "age": {"type": "integer"},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": _STRING},
        "address": {
            "type": "object",
            "properties": {
                "street": _STRING,
                "city": _STRING,
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
            },
            "required": ["street", "city", "zip"],
            "additionalProperties": False,
        },
        "role": {"enum": ["admin", "editor", "viewer"]},
    },
    "required": ["name", "age", "email", "tags", "address", "role"],
    "additionalProperties": False,
}
_PERSON_TEXT = (
    '{"name": "Rosalind Élise Franklin", "age": 37, "email": "r.franklin@example.org", '
    '"tags": ["chemistry", "X-ray \\"51\\"", "日本語"], "address": {"street": "12 King\'s Road", '
    '"city": "London", "zip": "01234"}, "role": "editor"}'
)
CASES: dict[str, tuple[str, str]] = {
    "object with 6 fields": (from_json_schema(PERSON), _PERSON_TEXT),
    "any JSON object": (from_json_schema({"type": "object"}), _PERSON_TEXT),
    "object with 60 optional fields": (
        from_json_schema(
            {
                "type": "object",
                "properties": {f"{name}{n}": _STRING for n in range(20) for name in ("first", "second", "x")},
                "additionalProperties": False,
            }
        ),
        json.dumps({"first3": "some words and more words", "x7": "a", "second19": "the end"}),
    ),
    "call in text (Lark)": (
        from_grammar(f'start: TEXT "<call>" body "</call>"\nTEXT: /[^<]*/\nbody: %json {json.dumps(PERSON)}'),
        f"I will look that up for you, one moment. <call>{_PERSON_TEXT}</call>",
    ),
    "tag in text": (
        from_tags([Tag("<call>", PERSON, "</call>")], ["<call>"], frozenset()),
        f"I will look that up for you, one moment. <call>{_PERSON_TEXT}</call>",
    ),
}


def large_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary with byte pairs added until it has ``VOCAB_SIZE`` tokens: joined words."""
    whole: dict[str, Any] = json.loads(tokenizer.vocabulary.tokenizer)
    model = whole["model"]
    generator = random.Random(0)
    words = [token for token in model["vocab"] if token.isalpha() and len(token) <= 6]
    # Words that begin with a space are spelled with a letter of their own.
    starts = words + [token for token in model["vocab"] if token[0] == "Ġ" and token[1:].isalpha()]
    while len(model["vocab"]) < VOCAB_SIZE:
        first, second = generator.choice(starts), generator.choice(words)
        if first + second not in model["vocab"]:
            model["vocab"][first + second] = len(model["vocab"])
            model["merges"].append([first, second])
    return Vocabulary(json.dumps(whole), tokenizer.eos_token_ids)


def measure_masks() -> None:
    tokenizer = load_tokenizer(fetch_default_model())
    vocabulary = large_vocabulary(tokenizer)
    began = time.perf_counter()
    GrammarCompiler(vocabulary)
    print(f"reading the vocabulary of {VOCAB_SIZE} tokens: {time.perf_counter() - began:.2f} s")
    ready = threading.Event()
    matchers = GrammarMatchers(VOCAB_SIZE, ready.set)
    matchers.learn(vocabulary)
    matchers.prepare(Request("warm-up", (1,), SamplingParams(), grammar=from_regex("a")))
    ready.wait(60)
    matchers.take_prepared()
    print(
        "\n| grammar | compile ms | tokens | mask us: median | mean | p99 | first | 32 at once | accept us |"
    )
    print("|:--|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name, (grammar, text) in CASES.items():
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        times, accept_times, together = [], [], []
        compile_ms = 0.0
        for repeat in range(6):
            names = [f"{repeat}.{row}" for row in range(ROWS if repeat == 5 else 1)]
            for one in names:
                # Log-probabilities are asked for, so that no token is forced and each has a mask.
                ready.clear()
                began = time.perf_counter()
                params = SamplingParams(stop_token_ids=tokenizer.eos_token_ids, logprobs=0)
                matchers.prepare(Request(one, (1,), params, grammar=grammar))
                while not matchers.take_prepared():
                    ready.wait(5)
                compile_ms = max(compile_ms, (time.perf_counter() - began) * 1e3)
            shares = [ScheduledSequence(one, 0, 1, (), True) for one in names]
            for token_id in token_ids:
                began = time.perf_counter()
                matchers.masks(shares)
                mask_time = time.perf_counter() - began
                began = time.perf_counter()
                for one in names:
                    accepted = matchers.accept(one, token_id)
                    assert accepted.error is None, (name, accepted.error)
                accept_times.append((time.perf_counter() - began) / len(names) * 1e6)
                if len(names) > 1:
                    together.append(mask_time / len(names) * 1e6)
                else:
                    times.append(mask_time * 1e6)
            for one in names:
                matchers.forget(one)
        warm = times[len(token_ids) :]
        print(
            f"| {name} | {compile_ms:.1f} | {len(token_ids)} | {statistics.median(warm):.0f} "
            f"| {statistics.mean(warm):.0f} | {sorted(warm)[len(warm) * 99 // 100]:.0f} "
            f"| {statistics.mean(times[: len(token_ids)]):.0f} | {statistics.mean(together):.0f} "
            f"| {statistics.median(accept_times):.1f} |",
            flush=True,
        )
    matchers.shutdown()


def measure_steps(num_tokens: int, rounds: int) -> None:
    """32 sequences at once through the step loop and the CPU executor, each case in turn, round by round."""
    endless: dict[str, str | None] = {
        "free": None,
        "regex: any text": from_regex(r"(.|\n)*"),
        "JSON: list of strings": from_json_schema({"type": "array", "items": _STRING, "minItems": 1000}),
        "JSON: list of objects": from_json_schema({"type": "array", "items": PERSON, "minItems": 1000}),
    }
    path = fetch_default_model()
    tokenizer = load_tokenizer(path)
    executor, _ = create_executor(RuntimeConfig(path, device="cpu", max_model_len=2048))
    ready = threading.Event()
    matchers = GrammarMatchers(executor.spec.vocab_size, ready.set)
    matchers.learn(tokenizer.vocabulary)
    core = EngineCore(executor, matchers)
    speeds: dict[str, list[float]] = {name: [] for name in endless}
    steps: dict[str, list[float]] = {name: [] for name in endless}
    for turn in range(rounds + 1):  # the first warms everything up
        prompts = distinct_prompts(ROWS, 126, f"round {turn}")
        for name, grammar in endless.items():
            for row, prompt in enumerate(prompts):
                params = SamplingParams(seed=row, max_tokens=num_tokens)
                token_ids = tuple(tokenizer.encode(prompt))
                core.add_request(
                    Request(f"{turn}.{name}.{row}", token_ids, params, cache_salt=name, grammar=grammar)
                )
            count, began, times = 0, time.perf_counter(), []
            while count < ROWS * num_tokens:
                if not core.has_work:
                    ready.wait(0.01)
                    continue
                start = time.perf_counter()
                outputs = core.step().outputs
                count += sum(len(output.token_ids) for output in outputs)
                if len(outputs) == ROWS:
                    times.append(time.perf_counter() - start)
            if turn:
                speeds[name].append(count / (time.perf_counter() - began))
                steps[name] += times
    core.shutdown()
    print(f"\n| {ROWS} at once | tokens/s | of free | step ms: median | 10th percentile | of free |")
    print("|:--|--:|--:|--:|--:|--:|")
    free_speed = statistics.median(speeds["free"])
    free_step = statistics.quantiles(steps["free"], n=10)[0]
    for name in endless:
        speed, step = statistics.median(speeds[name]), statistics.quantiles(steps[name], n=10)[0]
        print(
            f"| {name} | {speed:.0f} | {speed / free_speed:.2f} | {statistics.median(steps[name]) * 1e3:.1f} "
            f"| {step * 1e3:.1f} | {step / free_step:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="What grammars cost.")
    parser.add_argument("--only", choices=("masks", "steps"))
    parser.add_argument("--tokens", type=int, default=64, help="of each sequence")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(machine())
    if arguments.only != "steps":
        measure_masks()
    if arguments.only != "masks":
        measure_steps(arguments.tokens, arguments.rounds)


if __name__ == "__main__":
    main()
