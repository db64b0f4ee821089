"""Texts, vocabularies and recorded answers that the tests of the text side share with the script that
records them.
"""

from __future__ import annotations

import array
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent / "fixtures"
TEMPLATES = FIXTURES / "templates"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def read_fixture(name: str) -> Any:
    return json.loads((FIXTURES / name).read_text("utf-8"))


def ids_from(line: str) -> list[int]:
    """Recorded token ids: numbers with spaces between them."""
    return [int(number) for number in line.split()]


def with_pre_tokenizer(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A GGUF vocabulary made to ask for another pre-tokenizer.

    SmolLM2 has a token for each digit only, so that it would hide how digits are grouped: it gets tokens
    for all numbers of two and three digits.
    """
    changed = {key: value for key, value in metadata.items() if key.startswith("tokenizer.ggml.")}
    del changed["tokenizer.ggml.add_bos_token"]  # the default depends on the pre-tokenizer
    tokens = list(metadata["tokenizer.ggml.tokens"])
    merges = list(metadata["tokenizer.ggml.merges"])
    for number in range(100):
        tokens.append(f"{number:02}")
        merges.append(f"{number // 10} {number % 10}")
    for number in range(1000):
        tokens.append(f"{number:03}")
        merges.append(f"{number // 10:02} {number % 10}")
    types = array.array("i", metadata["tokenizer.ggml.token_type"])
    types.extend([NORMAL] * (len(tokens) - len(types)))
    return changed | {
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }


def sentencepiece_metadata(*, add_space_prefix: bool) -> dict[str, Any]:
    """The metadata of a GGUF file with the small SentencePiece vocabulary of the fixtures."""
    rows = read_fixture("sentencepiece_vocabulary.json")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [token for token, _, _ in rows],
        "tokenizer.ggml.scores": array.array("f", [score for _, score, _ in rows]),
        "tokenizer.ggml.token_type": array.array("i", [kind for _, _, kind in rows]),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
    }


def chat_cases() -> Iterator[dict[str, Any]]:
    """Each recorded rendering: template, conversation, variables, and the text or the error."""
    conversations = read_fixture("conversations.json")
    for case in read_fixture("transformers_chats.json"):
        yield {**case, **conversations[case["conversation"]]}
