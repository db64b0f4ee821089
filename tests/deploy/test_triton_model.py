"""Triton's Python backend without Triton, whose module is faked, over an engine that hashes."""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from scheduler.hashing_executor import HashingExecutor
from server.app import create_app
from server.logs import set_log_level
from server.tokenizer import Tokenizer, load_tokenizer
from tests.server.in_process_engine import HashingEngine

_VERSION = Path(__file__).parents[2] / "deploy/triton_server/model_repository/inflightd/1"


class Tensor:
    def __init__(self, name: str, values: Any) -> None:
        self.name = name
        self.values = np.asarray(values)

    def as_numpy(self) -> Any:
        return self.values


class TritonError:
    CANCELLED, INTERNAL, INVALID_ARG, NOT_FOUND, UNAVAILABLE = range(5)

    def __init__(self, message: str, code: int) -> None:
        self.message, self.code = message, code


class Logger:
    @staticmethod
    def log_error(message: str) -> None:
        print(message)


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.outputs = {tensor.name: tensor.values[0] for tensor in output_tensors or []}
        self.error = error


class Request:
    """Inputs, and where the responses arrive."""

    def __init__(self, **inputs: Any) -> None:
        self.tensors = {
            name: Tensor(name, np.array([value.encode()], np.object_) if isinstance(value, str) else [value])
            for name, value in inputs.items()
        }
        self.responses: list[InferenceResponse] = []
        self.has_ended = threading.Event()
        self.is_wanted = True

    def get_response_sender(self) -> Request:
        return self

    def is_cancelled(self) -> bool:
        assert not self.has_ended.is_set(), "Triton's stub crashes here"
        return not self.is_wanted

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.has_ended.is_set()
        assert response is not None
        self.responses.append(response)
        if flags:
            self.has_ended.set()

    @property
    def text(self) -> str:
        return b"".join(response.outputs["text_output"] for response in self.responses).decode()

    @property
    def error(self) -> TritonError:
        (response,) = self.responses
        assert response.error is not None
        return response.error


@pytest.fixture(scope="module")
def engine(smollm2_path: Path) -> HashingEngine:
    vocab_size = load_tokenizer(smollm2_path).vocab_size
    return HashingEngine(HashingExecutor(64, 4, vocab_size=vocab_size, max_model_len=200))


@pytest.fixture(scope="module")
def model(engine: HashingEngine, smollm2_path: Path) -> Iterator[Any]:
    """The model as Triton has it after ``initialize``, with another engine."""
    utils = ModuleType("triton_python_backend_utils")
    vars(utils).update(
        Tensor=Tensor,
        Logger=Logger,
        TritonError=TritonError,
        InferenceResponse=InferenceResponse,
        TritonModelException=RuntimeError,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        get_input_tensor_by_name=lambda request, name: request.tensors.get(name),
    )
    tokenizer: Tokenizer = load_tokenizer(smollm2_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFLIGHTD_PYTHON", sys.executable)
        patch.setattr(sys, "executable", sys.executable)
        patch.setattr(sys, "path", [*sys.path, str(_VERSION)])
        patch.setitem(sys.modules, utils.__name__, utils)
        service = importlib.import_module("text_service").TextService

        async def start(self: Any) -> None:
            self._service = create_app(self._config, engine, tokenizer).state.service

        patch.setattr(service, "_start", start)
        model = importlib.import_module("model").TritonPythonModel()
        config = {"parameters": {"arguments": {"string_value": "--log-level error"}}}
        model.initialize({"model_config": json.dumps(config)})
        yield model
        model.finalize()
        set_log_level("warning")  # of this process, which the model takes for its own
        for name in ("text_service", "model"):
            del sys.modules[name]


@pytest.fixture
def ask(model: Any) -> Callable[..., Request]:
    def ask(**inputs: Any) -> Request:
        request = Request(**inputs)
        model.execute([request])
        assert request.has_ended.wait(10)
        return request

    return ask


def test_a_stream_has_the_pieces_of_the_whole(ask: Callable[..., Request]) -> None:
    fields = {"text_input": "One two", "max_tokens": 12, "seed": 3, "temperature": np.float32(1.0)}
    whole, streamed = ask(**fields), ask(**fields, stream=True)
    assert len(whole.responses) == 1
    assert len(streamed.responses) > 5
    assert streamed.text == whole.text != ""
    for last in (whole.responses[-1].outputs, streamed.responses[-1].outputs):
        assert (last["finish_reason"], last["num_output_tokens"]) == (b"length", 12)
        assert last["num_input_tokens"] == 2


def test_chats_and_other_fields_are_those_of_the_api(ask: Callable[..., Request]) -> None:
    messages = json.dumps([{"role": "user", "content": "Hi"}])
    answer = ask(messages=messages, sampling_parameters='{"max_completion_tokens": 5, "ignore_eos": true}')
    assert answer.responses[-1].outputs["num_output_tokens"] == 5
    assert answer.responses[-1].outputs["num_input_tokens"] > 10


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"temperature": 9.0}, "'temperature'"),
        ({"sampling_parameters": "{"}, "'sampling_parameters' is not valid JSON"),
        ({"sampling_parameters": '{"user": "\\ud800"}'}, "'sampling_parameters' is not valid JSON"),
        ({"sampling_parameters": '{"seed": 1' + "0" * 30 + "}"}, "'seed'"),
        ({"sampling_parameters": '{"top_p": NaN}'}, "'top_p'"),
        ({"sampling_parameters": "[]"}, "must be a JSON object"),
        ({"sampling_parameters": '{"logprobs": 1}'}, "'logprobs' is not supported here"),
        ({"messages": "[]"}, "either 'text_input' or 'messages'"),
        ({"max_tokens": 500}, "max_tokens"),
    ],
    ids=["range", "json", "surrogate", "integer", "nan", "object", "field", "both", "context"],
)
def test_errors_are_the_apis(ask: Callable[..., Request], inputs: dict[str, Any], message: str) -> None:
    error = ask(**{"text_input": "One", **inputs}).error
    assert message in error.message
    assert error.code == TritonError.INVALID_ARG


def test_several_texts_are_refused(ask: Callable[..., Request]) -> None:
    error = ask(sampling_parameters='{"prompt": ["One", "Two"]}').error
    assert "'prompt' must be one text" in error.message
    assert error.code == TritonError.INVALID_ARG


def test_a_request_that_cannot_be_read_takes_no_other_along(model: Any) -> None:
    broken, sound = Request(text_input="One", max_tokens=[]), Request(text_input="One", max_tokens=1)
    model.execute([broken, sound])
    assert broken.has_ended.wait(10)
    assert broken.error.code == TritonError.INTERNAL
    assert sound.has_ended.wait(10)
    assert sound.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--nonsense 1", "unrecognized arguments: --nonsense"),
        ("--port", "expected one argument"),
        ("--port x", "--port: 'x' is not a whole number"),
        ("--model 'x", "No closing quotation"),
    ],
)
def test_wrong_arguments_are_said_and_end_nothing(model: Any, arguments: str, message: str) -> None:
    config = {"parameters": {"arguments": {"string_value": arguments}}}
    with pytest.raises(RuntimeError, match=f"inflightd cannot start: .*{message}"):
        type(model)().initialize({"model_config": json.dumps(config)})


def test_a_start_that_fails_leaves_nothing_running(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(self: Any) -> None:
        raise OSError("no file descriptors")

    service = sys.modules["text_service"].TextService("--log-level error")
    monkeypatch.setattr(type(service), "_start", start)
    with pytest.raises(OSError, match="descriptors"):
        service.start()
    assert not service._thread.is_alive()


def test_an_engine_that_is_not_there_is_unavailable(
    ask: Callable[..., Request], engine: HashingEngine
) -> None:
    engine.is_ready = False
    try:
        assert ask(text_input="One").error.code == TritonError.UNAVAILABLE
    finally:
        engine.is_ready = True


def test_a_cancelled_request_ends_in_the_engine(model: Any, engine: HashingEngine) -> None:
    engine.pause = 0.05
    request = Request(
        text_input="One", max_tokens=150, sampling_parameters='{"ignore_eos": true}', stream=True
    )
    try:
        model.execute([request])
        deadline = time.monotonic() + 10
        while not request.responses:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        request.is_wanted = False
        assert request.has_ended.wait(5)
        error = request.responses[-1].error
        assert error is not None
        assert error.code == TritonError.CANCELLED
        while engine.stats.num_running:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        engine.pause = 0.0
    assert len(request.responses) < 100
