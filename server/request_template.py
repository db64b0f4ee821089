"""Chat templates that come with a request: written out in a process that may be lost.

``python -m server.request_template`` is that process. Jinja's sandbox keeps a template from everything but
time and memory: one line can loop for hours or double a text until the machine is full.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from server.chat_template import ChatTemplate, ChatTemplateError
from server.expendable_process import ExpendableProcess

MAX_SECONDS = 0.7
_MAX_BYTES = 2**30
_MAX_KEPT = 8
_MAX_ERROR_CHARS = 300  # templates word them


class RequestTemplates:
    """Writes chats out with templates of clients, one after the other. The process is started for the first.

    Not for several threads at a time.
    """

    def __init__(self, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        self._process = ExpendableProcess("server.request_template")

    def render(self, source: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """The text of a chat.

        Args:
            options: as for ``ChatTemplate.render``, with the variables among them.

        Raises:
            ChatTemplateError: it is no template, refuses the messages, or takes too much.
        """
        question = json.dumps([source, self._special_tokens, messages, options])
        answer = self._process.ask(question.encode())
        if answer is None:
            raise ChatTemplateError(
                f"The chat template takes too much: it did not end within {MAX_SECONDS} s and "
                f"{_MAX_BYTES >> 30} GiB."
            )
        text, error = json.loads(answer)
        if error is not None:
            error = error.replace("The model's chat template", "The chat template")
            raise ChatTemplateError(error[:_MAX_ERROR_CHARS])
        assert isinstance(text, str)
        return text

    def close(self) -> None:
        """Ends the process, if there is one."""
        self._process.close()


@lru_cache(maxsize=_MAX_KEPT)
def _template(source: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ChatTemplate(source, dict(special_tokens))


def _answer(question: bytes) -> tuple[str | None, str | None]:
    """The text, or what is wrong."""
    source, special_tokens, messages, options = json.loads(question)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)  # SIGALRM is not handled: it ends the process
    try:
        template = _template(source, tuple(special_tokens.items()))
        known = template.variables - {"self"} | {"tools", "add_generation_prompt", "continues_final"}
        return template.render(messages, **{name: options[name] for name in options if name in known}), None
    except ChatTemplateError as error:
        return None, str(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C reaches the whole terminal
    resource.setrlimit(resource.RLIMIT_DATA, (_MAX_BYTES, _MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    while len(head := questions.read(4)) == 4:
        size = int.from_bytes(head, "little")
        if len(question := questions.read(size)) < size:
            return
        answer = json.dumps(_answer(question)).encode()
        try:
            answers.write(len(answer).to_bytes(4, "little") + answer)
            answers.flush()
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
