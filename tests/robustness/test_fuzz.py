"""Few mutations of fixed seeds, of which the commands of the same modules do as many as you like."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

import pytest

from server.app import create_app
from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.robustness import fuzz_bodies, fuzz_sockets
from tests.robustness.fuzz_bodies import AnsweringEngine, BodyFuzz
from tests.robustness.http_mutations import mutated_request
from tests.robustness.json_mutations import mutated

# In hundreds of bodies; a connection takes about as long as two.
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

    monkeypatch.setattr(app.state.service.validator, "detokenize", broken, raising=False)
    monkeypatch.setattr(app.state.service.tokenization, "decode", broken, raising=False)
    await run.post("/detokenize", b'{"tokens": [1]}')
    assert len(run.findings) == 1
    assert "/detokenize" in run.findings[0]
