"""Records what llama.cpp and transformers make of texts and chats, for the tests of the text side.

    python -m tests.reference.record_text --llama-source DIR --llama-build DIR

``DIR``s: llama.cpp's sources and a CMake build of its static library (``-DBUILD_SHARED_LIBS=OFF``, target
``llama``). Needs a C++ compiler, transformers and the embedded default model, but no torch. Without the two
options only what transformers answers is recorded again. The small vocabularies are trained here, on texts
of the fixtures, if their files are missing.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from server.gguf_metadata import read_gguf_metadata
from server.model_source import fetch_default_model
from server.pre_tokenizers import PRE_TOKENIZERS
from tests.server.text_fixtures import (
    BYTE,
    CONTROL,
    FIXTURES,
    NORMAL,
    TEMPLATES,
    UNKNOWN,
    USER_DEFINED,
    read_fixture,
    sentencepiece_metadata,
    with_pre_tokenizer,
)  # fmt: skip

HERE = Path(__file__).parent
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
               "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"]  # fmt: skip


def write_fixture(name: str, value: Any) -> None:
    """JSON with a line for each element of the outermost list or object."""
    rows: list[str]
    if isinstance(value, dict):
        rows = [f"{json.dumps(key)}: {json.dumps(row, ensure_ascii=False)}" for key, row in value.items()]
    else:
        rows = [json.dumps(row, ensure_ascii=False) for row in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    (FIXTURES / name).write_text(opening + "\n" + ",\n".join(rows) + "\n" + closing + "\n", "utf-8")


def write_vocabulary(path: Path, metadata: Mapping[str, Any]) -> None:
    """A GGUF file without tensors, written by the gguf package."""
    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, list(value))
    for key, number in {
        "context_length": 64,
        "embedding_length": 8,
        "block_count": 1,
        "feed_forward_length": 8,
    }.items():
        writer.add_uint32(f"llama.{key}", number)
    writer.add_uint32("llama.attention.head_count", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


class LlamaCpp:
    """llama.cpp's tokenizer."""

    def __init__(self, source: Path, build: Path, scratch: Path) -> None:
        self._binary, self._scratch = scratch / "llama_ids", scratch
        libraries = [build / "src/libllama.a"]
        libraries += [build / f"ggml/src/lib{name}.a" for name in ("ggml", "ggml-cpu", "ggml-base")]
        command = ["g++", "-std=c++17", "-O1", f"-I{source}/include", f"-I{source}/ggml/include"]
        command += [str(HERE / "llama_ids.cpp"), "-o", str(self._binary), *map(str, libraries)]
        subprocess.run([*command, "-lpthread", "-ldl", "-fopenmp"], check=True)

    def ids(self, metadata: Mapping[str, Any], texts: list[str], *, as_prompt: bool) -> list[str]:
        """Token ids of each text: as a prompt (BOS, control tokens taken as such) or as plain text."""
        path = self._scratch / "vocabulary.gguf"
        write_vocabulary(path, metadata)
        flags = "1 1" if as_prompt else "0 0"
        requests = "".join(f"{flags} {text.encode().hex()}\n" for text in texts)
        result = subprocess.run(
            [self._binary, path], input=requests, capture_output=True, text=True, check=True
        )
        lines = result.stdout.split("\n")[:-1]
        assert len(lines) == len(texts)
        return lines


def record_llama_cpp(llama: LlamaCpp) -> None:
    texts = read_fixture("texts.json")
    model = read_gguf_metadata(fetch_default_model())
    vocabulary = {key: value for key, value in model.items() if key.startswith("tokenizer.ggml.")}
    write_fixture(
        "llama_cpp_smollm2.json",
        {
            "prompt": llama.ids(vocabulary, texts, as_prompt=True),
            "plain": llama.ids(vocabulary, texts, as_prompt=False),
        },
    )
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in PRE_TOKENIZERS:
        if name == "gpt2":  # an older name that llama.cpp has dropped
            continue
        ids = llama.ids(with_pre_tokenizer(model, name), texts, as_prompt=True)
        groups.setdefault(tuple(ids), []).append(name)
    write_fixture(
        "llama_cpp_pre_tokenizers.json", [{"names": names, "ids": list(ids)} for ids, names in groups.items()]
    )
    write_fixture(
        "llama_cpp_sentencepiece.json",
        {
            f"{kind}, {'with' if prefix else 'without'} space": llama.ids(
                sentencepiece_metadata(add_space_prefix=prefix), texts, as_prompt=kind == "prompt"
            )
            for kind in ("prompt", "plain")
            for prefix in (True, False)
        },
    )


def training_texts() -> list[str]:
    """Without control tokens: merges must not make any."""
    names = [*SPECIAL.values(), *CHAT_TOKENS, "<|"]
    return [text for text in read_fixture("texts.json") if not any(name in text for name in names)]


def train_sentencepiece_vocabulary() -> None:
    """Pieces as SentencePiece numbers them: unknown and control tokens, bytes, merged pieces, single
    letters.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        training_texts(),
        trainers.BpeTrainer(vocab_size=900, show_progress=False, max_token_length=16),
    )
    learnt = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merged = [piece for piece, _ in learnt if len(piece) > 1]
    letters = [piece for piece, _ in learnt if len(piece) == 1]
    rows: list[tuple[str, float, int]] = [("<unk>", 0, UNKNOWN), ("<s>", 0, CONTROL), ("</s>", 0, CONTROL)]
    rows += [(f"<0x{byte:02X}>", 0, BYTE) for byte in range(256)]
    rows += [(token, 0, CONTROL) for token in ("<start_of_turn>", "<end_of_turn>")]
    rows += [(token, 0, USER_DEFINED) for token in ("\n\n", "  ", "   ", "<b>")]
    known = {token for token, _, _ in rows}
    pieces = [
        piece
        for piece in dict.fromkeys(merged + letters)
        if not (piece in known or "\n" in piece or "\0" in piece)
    ]
    rows += [(piece, -float(rank), NORMAL) for rank, piece in enumerate(pieces)]
    write_fixture("sentencepiece_vocabulary.json", rows)


def train_folders() -> None:
    """Two small tokenizers as Hugging Face folders: byte-level, and with SentencePiece's spelling."""
    texts = training_texts() * 3
    byte_level = Tokenizer(models.BPE())
    byte_level.normalizer = normalizers.NFC()
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, initial_alphabet=alphabet)
    byte_level.train_from_iterator(texts, trainer)
    byte_level.add_special_tokens([*SPECIAL.values(), *CHAT_TOKENS])
    byte_level.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    byte_level.enable_truncation(8)  # must be ignored by a server
    byte_level.enable_padding(length=16, pad_token="<unk>")
    save_folder("byte_level", byte_level, {"add_bos_token": False}, eos_token_id=[601, 605])

    rows = read_fixture("sentencepiece_vocabulary.json")
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    special = [*SPECIAL.values(), *(f"<0x{byte:02X}>" for byte in range(256))]
    words.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=len(rows), special_tokens=special, show_progress=False)
    )
    model = json.loads(words.to_str())["model"]
    spelled = Tokenizer(
        models.BPE(
            vocab=model["vocab"],
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spelled.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spelled.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    spelled.add_special_tokens([*SPECIAL.values(), *CHAT_TOKENS])
    spelled.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", spelled.token_to_id("<s>"))]
    )
    save_folder("sentencepiece", spelled, {}, eos_token_id=spelled.token_to_id("</s>"))

    spelled.normalizer = None
    spelled.pre_tokenizer = pre_tokenizers.Metaspace(split=False, prepend_scheme="first")
    spelled.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    save_folder("metaspace", spelled, {"add_bos_token": True, "add_eos_token": True}, eos_token_id=None)


def save_folder(name: str, tokenizer: Tokenizer, config: dict[str, Any], eos_token_id: Any) -> None:
    folder = FIXTURES / name
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n", "utf-8")
    config = {
        **config,
        "bos_token": {
            "__type": "AddedToken",
            "content": "<s>",
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
        },
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}) + "\n", "utf-8")
    (folder / "chat_template.jinja").write_text((TEMPLATES / "chatml.jinja").read_text("utf-8"), "utf-8")


def record_folders() -> None:
    """Encodings, decodings and chats of the folders by ``AutoTokenizer``."""
    from transformers import AutoTokenizer

    texts, conversations = read_fixture("texts.json"), read_fixture("conversations.json")
    rng = random.Random(7)
    answers: dict[str, Any] = {}
    for name in ("byte_level", "sentencepiece", "metaspace"):
        tokenizer = AutoTokenizer.from_pretrained(FIXTURES / name)
        encodings = [tokenizer(text, truncation=False, padding=False)["input_ids"] for text in texts]
        sequences = [rng.choices(range(len(tokenizer)), k=rng.randrange(1, 12)) for _ in range(200)]
        for sequence in sequences[:50]:
            sequence.insert(0, tokenizer.bos_token_id)
        answers[name] = {
            "encodings": [" ".join(map(str, ids)) for ids in encodings],
            "chats": {
                chat: " ".join(
                    map(
                        str,
                        tokenizer.apply_chat_template(
                            conversations[chat]["messages"],
                            add_generation_prompt=conversations[chat].get("add_generation_prompt", True),
                            return_dict=False,
                            padding=False,
                        ),
                    )
                )
                for chat in ("user", "system_user", "multi_turn", "no_prompt")
            },
            "decodings": [
                [
                    " ".join(map(str, ids)),
                    tokenizer.decode(ids, skip_special_tokens=True),
                    tokenizer.decode(ids),
                ]
                for ids in sequences
            ],
        }
    write_fixture("transformers_folders.json", answers)


def record_chats() -> None:
    """What transformers writes for each template and conversation, or that it fails."""
    import jinja2
    from transformers import AutoTokenizer

    renderer = AutoTokenizer.from_pretrained(FIXTURES / "byte_level")
    templates = {path.stem: path.read_text("utf-8") for path in sorted(TEMPLATES.glob("*.jinja"))}
    templates["smollm2"] = read_gguf_metadata(fetch_default_model())["tokenizer.chat_template"]
    cases = []
    for template, source in templates.items():
        for name, conversation in read_fixture("conversations.json").items():
            case = {"template": template, "conversation": name}
            try:
                case["text"] = renderer.apply_chat_template(
                    conversation["messages"],
                    tools=conversation.get("tools"),
                    chat_template=source,
                    add_generation_prompt=conversation.get("add_generation_prompt", True),
                    tokenize=False,
                    **conversation.get("variables", {}),
                )
            except (jinja2.TemplateError, TypeError) as error:
                case["error"] = str(error)
            cases.append(case)
    write_fixture("transformers_chats.json", cases)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-source", type=Path, metavar="DIR")
    parser.add_argument("--llama-build", type=Path, metavar="DIR")
    options = parser.parse_args()
    if not (FIXTURES / "sentencepiece_vocabulary.json").exists():
        train_sentencepiece_vocabulary()
        train_folders()
    record_folders()
    record_chats()
    if options.llama_source and options.llama_build:
        with tempfile.TemporaryDirectory() as scratch:
            record_llama_cpp(LlamaCpp(options.llama_source, options.llama_build, Path(scratch)))


if __name__ == "__main__":
    main()
