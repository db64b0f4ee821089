"""Triton's Python backend: tensors in, tensors out, as many responses as the text has pieces."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

# In here Python is embedded: it may know nothing of the environment that the package is installed in, and
# sys.executable, which is to run the engine process, is Triton's program.
sys.executable = os.environ.get("INFLIGHTD_PYTHON") or os.path.join(sys.prefix, "bin", "python3")
_paths = subprocess.check_output([sys.executable, "-c", "import json, sys; print(json.dumps(sys.path))"])
sys.path += [path for path in json.loads(_paths) if path and path not in sys.path]

# isort: split
import numpy as np  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402
from text_service import Ending, TextService  # noqa: E402

from server.errors import ApiError, InternalError, InvalidJsonError  # noqa: E402
from server.json_body import parse_json  # noqa: E402

_CANCELLATION_POLL_S = 0.05
# Input tensors and the fields of a body that they set.
_SCALARS = ("max_tokens", "temperature", "top_p", "top_k", "seed")


class TritonPythonModel:
    """Starts one engine and gives it all requests, which it batches step by step."""

    def initialize(self, args: dict[str, str]) -> None:
        """Returns when the engine takes requests. Raises TritonModelException."""
        parameters = json.loads(args["model_config"])["parameters"]
        try:
            self._service = TextService(parameters["arguments"]["string_value"])
            self._service.start()
        except Exception as error:
            raise pb_utils.TritonModelException(f"inflightd cannot start: {error}") from error

    def execute(self, requests: list[Any]) -> None:
        """Begins with requests; their responses come later, through their senders."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                fields, is_stream = _fields_of(request)
            except Exception as error:  # the other requests are to be answered whatever is wrong with one
                _fail(sender, error)
                continue
            self._service.submit(self._answer(fields, is_stream, sender))

    def finalize(self) -> None:
        self._service.stop()

    async def _answer(self, fields: dict[str, Any], is_stream: bool, sender: Any) -> None:
        answering = asyncio.create_task(self._send(fields, is_stream, sender))
        while not answering.done():
            await asyncio.wait((answering,), timeout=_CANCELLATION_POLL_S)
            # Once the last response has been sent, there is nothing left to ask: Triton's stub would crash.
            if not answering.done() and sender.is_cancelled():
                answering.cancel()
                await asyncio.wait((answering,))
        if answering.cancelled():
            cancelled = pb_utils.TritonError(
                "the client cancelled the request", pb_utils.TritonError.CANCELLED
            )
            _end(sender, pb_utils.InferenceResponse(error=cancelled))
        elif (error := answering.exception()) is not None:
            _fail(sender, error)

    async def _send(self, fields: dict[str, Any], is_stream: bool, sender: Any) -> None:
        pieces: list[str] = []
        answer = self._service.answer(fields)
        try:
            async for item in answer:
                if isinstance(item, Ending):
                    _end(sender, _response("".join(pieces), item))
                elif is_stream:
                    sender.send(_response(item))
                else:
                    pieces.append(item)
        finally:
            await answer.aclose()


def _fields_of(request: Any) -> tuple[dict[str, Any], bool]:
    """The body that the tensors ask for, and whether it is to be streamed. Raises InvalidJsonError."""
    fields: dict[str, Any] = {}
    given = _text(request, "sampling_parameters")
    if given:
        fields = parse_json(given[0].encode(), "'sampling_parameters'", param="sampling_parameters")
        if not isinstance(fields, dict):
            raise InvalidJsonError(
                "'sampling_parameters' must be a JSON object.", param="sampling_parameters"
            )
    for name in _SCALARS:
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is not None:
            fields[name] = tensor.as_numpy().reshape(-1)[0].item()
    if stop := _text(request, "stop"):
        fields["stop"] = stop
    if text := _text(request, "text_input"):
        fields["prompt"] = text[0]
    if messages := _text(request, "messages"):
        fields["messages"] = parse_json(messages[0].encode(), "'messages'", param="messages")
    stream = pb_utils.get_input_tensor_by_name(request, "stream")
    return fields, stream is not None and bool(stream.as_numpy().reshape(-1)[0])


def _text(request: Any, name: str) -> list[str]:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return []
    try:
        return [bytes(each).decode() for each in tensor.as_numpy().reshape(-1)]
    except UnicodeDecodeError:
        raise InvalidJsonError(f"'{name}' is not UTF-8.", param=name) from None


def _response(text: str, ending: Ending | None = None) -> Any:
    reason, num_input, num_output = "", 0, 0
    if ending is not None:
        reason, num_input, num_output = ending.finish_reason, ending.num_prompt_tokens, ending.num_tokens
    return pb_utils.InferenceResponse(
        output_tensors=[
            pb_utils.Tensor("text_output", np.array([text.encode()], dtype=np.object_)),
            pb_utils.Tensor("finish_reason", np.array([reason.encode()], dtype=np.object_)),
            pb_utils.Tensor("num_input_tokens", np.array([num_input], dtype=np.int32)),
            pb_utils.Tensor("num_output_tokens", np.array([num_output], dtype=np.int32)),
        ]
    )


def _fail(sender: Any, error: BaseException) -> None:
    if not isinstance(error, ApiError):
        pb_utils.Logger.log_error(f"inflightd: {error!r}")
        error = InternalError()
    _end(sender, pb_utils.InferenceResponse(error=pb_utils.TritonError(error.message, _code(error.status))))


def _end(sender: Any, response: Any) -> None:
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _code(status: int) -> Any:
    if status == 404:
        return pb_utils.TritonError.NOT_FOUND
    if status in (429, 503, 504):
        return pb_utils.TritonError.UNAVAILABLE
    return pb_utils.TritonError.INVALID_ARG if status < 500 else pb_utils.TritonError.INTERNAL
