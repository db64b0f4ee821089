"""Few mutations of fixed seeds, of which the commands of the same modules do as many as you like."""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from server.app import create_app
from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.robustness import fuzz_bodies, fuzz_files, fuzz_sockets
from tests.robustness.fuzz_bodies import AnsweringEngine, BodyFuzz
from tests.robustness.fuzz_files import FileFuzz, FileKind, file_kinds, try_one
from tests.robustness.http_mutations import mutated_request
from tests.robustness.json_mutations import mutated

# In hundreds of bodies; a connection takes about as long as two, a file as one.
_SIZE = int(os.environ.get("INFLIGHTD_FUZZ_SIZE", "5"))


async def test_mutated_bodies_get_an_answer_or_the_clients_error(tokenizer: Tokenizer) -> None:
    run = await fuzz_bodies.fuzz(tokenizer, _SIZE * 100, "test", grammars=0.0)
    assert run.findings == []
    assert {200, 400, 422} <= run.statuses.keys() <= {200, 400, 404, 413, 415, 422}


async def test_mutated_http_gets_an_answer_and_no_connection_stays(tokenizer: Tokenizer) -> None:
    run = await fuzz_sockets.fuzz(tokenizer, _SIZE * 40, "test", 32)
    assert run.findings == []
    assert {200, 400, 404, 405} <= run.statuses.keys()


@pytest.mark.parametrize("kind", ["mutated body", "mutated request"])
def test_a_seed_gives_the_same_bytes_again(kind: str) -> None:
    def made(seed: str) -> Sequence[bytes]:
        chance = random.Random(seed)
        if kind == "mutated request":
            return [mutated_request(chance) for _ in range(30)]
        return [mutated({"a": [1, {"b": "c"}], "d": None}, chance) for _ in range(30)]

    assert made("x") == made("x")
    assert made("x") != made("y")
    assert len(set(made("x"))) > 25


async def test_what_must_not_be_is_found(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(ServerConfig(), AnsweringEngine(), tokenizer)
    run = BodyFuzz(app)

    async def broken(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(app.state.service.tokenization, "decode", broken)
    await run.post("/detokenize", b'{"tokens": [1]}')
    assert len(run.findings) == 1
    assert "/detokenize" in run.findings[0]


@pytest.mark.parametrize("name", ["safetensors", "gguf", "config", "tokenizer"])
def test_mutated_model_files_are_loaded_or_refused(name: str, tmp_path: Path) -> None:
    run = FileFuzz()
    kind = file_kinds(tmp_path)[name]
    for number in range(_SIZE * 40):
        try_one(kind, name, tmp_path, "test", number, run)
    assert run.findings == []
    assert run.outcomes["refused"] > _SIZE * 20
    assert run.outcomes["loaded"] > 0


@pytest.mark.parametrize(
    ("load", "found"),
    [
        (lambda folder: 1 / 0, "ZeroDivisionError"),
        (lambda folder: bytearray(2**40), "MemoryError"),
        (lambda folder: time.sleep(1.1), r"1\.\d s"),
    ],
)
def test_files_that_do_harm_are_found(load: Callable[[Path], None], found: str, tmp_path: Path) -> None:
    kind = FileKind(lambda folder, chance: None, load, (ValueError,))
    run = FileFuzz()
    try_one(kind, "x", tmp_path, "test", 7, run)
    assert len(run.findings) == 1
    assert re.match(f"x test 7: {found}", run.findings[0])


def _lost_at_3(name: str, seed: str, numbers: range, report: Connection) -> None:
    report.send((numbers.start, None))
    if 3 in numbers:
        os._exit(1)
    report.send((numbers.stop, FileFuzz(Counter(loaded=len(numbers)))))


def test_a_process_that_is_lost_is_a_finding_and_the_next_goes_on() -> None:
    run = fuzz_files.fuzz("config", 700, "test", _lost_at_3)
    assert run.findings == ["config test: lost or hung with one of the files 0 to 499"]
    assert run.outcomes["loaded"] == 200
