from __future__ import annotations

import asyncio
import contextlib
import pickle
import socket
import stat
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
import zmq

from scheduler.engine_core import EngineCore
from scheduler.hashing_executor import HashingExecutor, run_alone
from scheduler.messages import (
    EngineOutput,
    EngineOutputs,
    EngineStats,
    ExecutorSpec,
    FinishReason,
    ProfileSteps,
    Request,
    SamplingParams,
    StepPhase,
    StepProfile,
    TokenLogprobs,
    Vocabulary,
)
from server import transport
from server.config import ServerConfig
from server.transport import (
    ApiEnd,
    EngineEnd,
    Kind,
    Progress,
    Ready,
    Start,
    TransportError,
    decode,
    encode,
    private_address,
)
from tests.scheduler.pattern_grammars import PatternGrammars

SPEC = ExecutorSpec("m", 16, 4, 32, 64, 8, 16, "cpu")
MESSAGES = [
    (Kind.START, Start(ServerConfig(model="x", served_model_name=("a", "b")), "/models/x")),
    (
        Kind.REQUEST,
        Request("r", (1, 2), SamplingParams(logit_bias=((3, -1.5),)), 1.25, -1, "salt", (5,), grammar="{}"),
    ),
    (Kind.JOIN, None),
    (Kind.LEAVE, "api-1"),
    (Kind.ABORT, "r"),
    (Kind.QUIT, None),
    (Kind.VOCABULARY, Vocabulary("{}", (1, 2))),
    (Kind.PROGRESS, Progress("weights", 3, 9)),
    (Kind.READY, Ready(SPEC, "plan", 1.5)),
    (
        Kind.OUTPUTS,
        EngineOutputs(
            (
                EngineOutput(
                    "r", (5,), (TokenLogprobs(5, -0.5, 1, ((5, -0.5),)),), None, FinishReason.LENGTH, 4, 2.5
                ),
                EngineOutput("e", (5,), finish_reason=FinishReason.LENGTH, embedding=(0.25, -1.5)),
            ),
            EngineStats(num_running=1, kv_cache_usage=0.5),
            StepProfile(2**62, (StepPhase(3, "execute", 1.25, 0.5, 7, 2),)),
        ),
    ),
    (Kind.FLUSH, None),
    (Kind.FLUSHED, 12),
    (Kind.PROFILE, ProfileSteps(2**62, 100)),
    (Kind.LOG_LEVEL, "debug"),
    (Kind.FAILED, "no memory"),
]


@pytest.mark.parametrize(("kind", "body"), MESSAGES, ids=lambda value: getattr(value, "name", ""))
def test_a_message_comes_back_as_it_was(kind: Kind, body: object) -> None:
    assert decode(list(encode(kind, body))) == (kind, body)


def test_every_kind_is_covered() -> None:
    assert {kind for kind, _ in MESSAGES} == set(Kind)


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"A"],
        [b"?", b"\xc0"],
        [b"A", b""],
        [b"A", b"\xff\xff"],
        [b"A", msgspec.msgpack.encode({"request_id": 5})],
        [b"X", msgspec.msgpack.encode(["r"])],
        [b"\x80\x04.", b"\xc0"],
        [b"A", b"\xc0", b"\xc0"],
    ],
)
def test_anything_else_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(TransportError):
        decode(frames)


def test_the_socket_is_in_a_private_directory() -> None:
    with private_address() as address:
        directory = Path(address.removeprefix("ipc://")).parent
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert not directory.exists()


@contextlib.asynccontextmanager
async def _line_to(
    core: EngineCore, take_vocabulary: Callable[[Vocabulary], None] = lambda _: None
) -> AsyncIterator[tuple[ApiEnd, EngineEnd]]:
    """An API process's end, and that of an engine that runs in a thread; it has ended afterwards."""
    with private_address() as address:
        api, engine = ApiEnd(address), EngineEnd(address)
        api.send(Kind.JOIN)
        thread = threading.Thread(target=lambda: (engine.run(core, take_vocabulary), engine.close()))
        thread.start()
        try:
            yield api, engine
        finally:
            api.send(Kind.QUIT)
            await asyncio.to_thread(thread.join, 10)
            api.close()
    assert not thread.is_alive()


async def test_an_engine_core_behind_the_line() -> None:
    executor = HashingExecutor(num_blocks=64, block_size=4)
    core = EngineCore(executor)
    request = Request("r", (1, 0, 1, 1, 0), SamplingParams(max_tokens=9))
    async with _line_to(core) as (api, _):
        api.send(Kind.REQUEST, request)
        tokens: list[int] = []
        while True:
            kind, body = await asyncio.wait_for(api.receive(), 10)
            assert kind is Kind.OUTPUTS
            for output in body.outputs:
                tokens += output.token_ids
            if any(output.finish_reason is not None for output in body.outputs):
                break
        assert tokens == run_alone(request, executor.spec)[0]
        assert len(tokens) == 9
        api.send(Kind.REQUEST, Request("s", (1,), SamplingParams(max_tokens=100_000)))
        api.send(Kind.ABORT, "s")
        while True:
            kind, body = await asyncio.wait_for(api.receive(), 10)
            if any(output.finish_reason is not None for output in body.outputs):
                break
        assert body.outputs[-1].finish_reason is FinishReason.ABORT
        assert body.stats.num_running == 0
    core.check_invariants()


async def test_strangers_on_the_line_disturb_nobody(caplog: pytest.LogCaptureFixture) -> None:
    core = EngineCore(HashingExecutor(num_blocks=64, block_size=4, step_seconds=0.01))
    start = encode(*MESSAGES[0])
    with private_address() as address:
        engine = EngineEnd(address)
        starter, context = ApiEnd(address, "starter"), zmq.Context()
        starter.send(*MESSAGES[0])
        assert engine.receive()[0] is Kind.START
        thread = threading.Thread(target=lambda: (engine.run(core), engine.close()))
        thread.start()
        try:
            starter.send(Kind.JOIN)
            request = Request("r", (1, 0, 1), SamplingParams(max_tokens=120))
            starter.send(Kind.REQUEST, request)
            num_tokens = 0
            while not num_tokens:  # or a stranger could be first with the id
                kind, body = await asyncio.wait_for(starter.receive(), 10)
                num_tokens += sum(len(output.token_ids) for output in body.outputs)
            garbage = [
                (pickle.dumps({"a": 1}),),
                (b"A", pickle.dumps(["r"])),
                (b"A", b"\xff" * 100_000),
                start,
                encode(Kind.REQUEST, request),  # an id that runs
                encode(Kind.QUIT),
                encode(Kind.VOCABULARY, Vocabulary("{}", ())),
            ]
            for frames in garbage:
                stranger = context.socket(zmq.DEALER)
                stranger.setsockopt(zmq.LINGER, 200)
                stranger.connect(address)
                stranger.send_multipart(frames)
                stranger.send_multipart(encode(Kind.ABORT, "r"))  # of whom nobody listens any more
                stranger.close()
            for content in (b"GET / HTTP/1.1\r\n\r\n", b"\x80\x04." * 1000, bytes(1000)):
                with socket.socket(socket.AF_UNIX) as raw, contextlib.suppress(OSError):
                    raw.connect(address.removeprefix("ipc://"))
                    raw.sendall(content)
            while num_tokens < 120:
                kind, body = await asyncio.wait_for(starter.receive(), 10)
                assert kind is Kind.OUTPUTS
                num_tokens += sum(len(output.token_ids) for output in body.outputs)
            async with asyncio.timeout(5):
                while caplog.text.count("a stranger on the line") < len(garbage):
                    starter.send(Kind.ABORT, "nobody")
                    await asyncio.sleep(0.02)
            assert thread.is_alive()
        finally:
            starter.send(Kind.QUIT)
            await asyncio.to_thread(thread.join, 10)
            starter.close()
            context.term()
    assert not thread.is_alive()
    core.check_invariants()


class _Checked(EngineCore):
    """Counts how often its invariants are checked."""

    num_checks = 0

    def check_invariants(self) -> None:
        self.num_checks += 1
        super().check_invariants()


async def test_an_engine_checks_itself_when_it_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_CHECK_AFTER_IDLE_MS", 500)
    core = _Checked(HashingExecutor(num_blocks=64, block_size=4))
    async with _line_to(core) as (api, _):
        for index in range(3):  # never idle for long
            api.send(Kind.REQUEST, Request(f"r{index}", (1,), SamplingParams(max_tokens=5)))
            await asyncio.sleep(0.05)
        assert core.num_checks == 0
        async with asyncio.timeout(10):
            while not core.num_checks:  # noqa: ASYNC110 - the engine has no event for it
                await asyncio.sleep(0.01)


async def test_an_idle_engine_is_woken_when_a_grammar_is_ready() -> None:
    grammars = PatternGrammars(forces=False, is_slow=True)
    core = EngineCore(HashingExecutor(num_blocks=64, block_size=4, vocab_size=4), grammars)
    told: list[Vocabulary] = []
    async with _line_to(core, told.append) as (api, engine):
        for _ in range(3):  # also long after it has gone to sleep
            api.send(Kind.VOCABULARY, Vocabulary("{}", ()))
            api.send(Kind.REQUEST, Request("r", (1,), SamplingParams(), grammar="01"))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(api.receive(), 0.1)
            grammars.finish()
            engine.wake()
            tokens: list[int] = []
            while len(tokens) < 3:
                _, body = await asyncio.wait_for(api.receive(), 10)
                tokens += [token for output in body.outputs for token in output.token_ids]
            assert tokens == [0, 1, 3]
    assert told == [Vocabulary("{}", ())] * 3


def test_folders_of_killed_servers_are_removed_and_those_in_use_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    killed = tmp_path / "inflightd-killed"
    killed.mkdir()
    (killed / "lock").touch()
    (tmp_path / "inflightd-something-else").mkdir()
    with private_address() as first, private_address():
        assert not killed.exists()
        assert Path(first.removeprefix("ipc://")).parent.is_dir()
        assert len(list(tmp_path.glob("inflightd-*/lock"))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["inflightd-something-else"]
