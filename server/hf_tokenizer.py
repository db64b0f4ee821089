"""The tokenizer of a folder in Hugging Face format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from server.tokenizer_spec import TokenizerError, TokenizerSpec, checked

_MAX_TOKENIZER_BYTES = 256 * 2**20
_MAX_CONFIG_BYTES = 16 * 2**20
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OTHER_VOCABULARIES = ("tokenizer.model", "vocab.json", "tekken.json", "spiece.model", "tiktoken.model")


def tokenizer_from_folder(folder: Path) -> TokenizerSpec:
    """Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json,
    config.json and the chat template's files; of these only the first must be there. Python code in the
    folder is never run.

    Raises:
        TokenizerError: no tokenizer, or files that cannot be used.
    """
    config = _read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        backend = _read_backend(folder / "tokenizer.json")
    else:
        backend = _convert(folder)
    backend.no_truncation()
    backend.no_padding()
    named = _named_tokens(config)
    if "added_tokens_decoder" not in config:  # older folders say it in a file of its own
        named |= _named_tokens(_read_json(folder / "special_tokens_map.json"))
    _add_missing_tokens(backend, config, named.values())
    bos = named.get("bos_token")
    return TokenizerSpec(
        backend=backend,
        bos_token_id=None if bos is None else backend.token_to_id(bos),
        eos_token_ids=_eos_ids(folder, backend, named),
        named_special_tokens=named,
        chat_templates=_chat_templates(folder, config),
    )


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if path.stat().st_size > _MAX_TOKENIZER_BYTES:
        raise TokenizerError(f"{path.name} is {path.stat().st_size >> 20} MiB long: that is no tokenizer.")
    return checked(lambda: tokenizers.Tokenizer.from_file(str(path)), f"{path.name} cannot be read")


def _convert(folder: Path) -> tokenizers.Tokenizer:
    """Builds a tokenizer from an older kind of vocabulary through transformers (which takes seconds)."""
    if not any((folder / name).is_file() for name in _OTHER_VOCABULARIES):
        raise TokenizerError(f"{folder.name} has no tokenizer.json: copy it from where the model comes from.")
    advice = (
        "Make a tokenizer.json once, on a machine where transformers can read the model: "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
    )
    try:
        from transformers import AutoTokenizer

        converted = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        backend = getattr(converted, "backend_tokenizer", None)
    except Exception as error:  # missing packages, unknown kinds, damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TokenizerError(
            f"{folder.name} has no tokenizer.json, and its vocabulary cannot be converted ({reason}). "
            f"{advice}"
        ) from None
    if not isinstance(backend, tokenizers.Tokenizer):
        raise TokenizerError(
            f"{folder.name} has no tokenizer.json, and its tokenizer has no fast version. {advice}"
        )
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise TokenizerError(
            f"{path.name} is {path.stat().st_size >> 20} MiB long: that is no configuration."
        )
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path.name} holds no JSON object.")
    return value


def _content(token: Any) -> str | None:
    """A token is written as text or as an object with its text in ``content``."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    return {name: content for name in _NAMED_TOKENS if (content := _content(config.get(name)))}


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Iterable[str]
) -> None:
    """Older folders list added tokens in tokenizer_config.json only; named tokens are always control
    tokens.
    """
    listed = config.get("added_tokens_decoder")
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    missing: list[AddedToken] = []
    if isinstance(listed, Mapping):
        entries = [(int(number), entry) for number, entry in listed.items() if str(number).isdecimal()]
        for _, entry in sorted(entries, key=lambda pair: pair[0]):
            content = _content(entry)
            if content and content not in known:
                flags = {
                    flag: bool(entry.get(flag, False))
                    for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")
                }
                missing.append(AddedToken(content, **flags))
    listed_names = {token.content for token in missing}
    missing += [
        AddedToken(content, normalized=False, special=True)
        for content in dict.fromkeys(named)
        if content not in listed_names and (content not in known or not known[content].special)
    ]
    if missing:
        backend.add_tokens(missing)


def _eos_ids(folder: Path, backend: tokenizers.Tokenizer, named: Mapping[str, str]) -> tuple[int, ...]:
    """The tokenizer's EOS and those of generation_config.json, or else of config.json."""
    ids: list[Any] = [backend.token_to_id(named["eos_token"])] if "eos_token" in named else []
    for name in ("generation_config.json", "config.json"):
        listed = _read_json(folder / name).get("eos_token_id")
        if listed is not None:
            ids += listed if isinstance(listed, list) else [listed]
            break
    return tuple(dict.fromkeys(i for i in ids if type(i) is int and i >= 0))


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Sources by name.

    The newest place wins: .jinja files, then chat_template.json, then tokenizer_config.json.
    """
    templates: dict[str, str] = {}
    for source in (
        config.get("chat_template"),
        _read_json(folder / "chat_template.json").get("chat_template"),
    ):
        if isinstance(source, str):
            templates["default"] = source
        elif isinstance(source, list):
            for entry in source:
                if isinstance(entry, Mapping) and isinstance(entry.get("template"), str):
                    templates[str(entry.get("name"))] = entry["template"]
    files = [("default", folder / "chat_template.jinja")]
    files += [(path.stem, path) for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    for name, path in files:
        if path.is_file():
            if path.stat().st_size > _MAX_CONFIG_BYTES:
                raise TokenizerError(
                    f"{path.name} is {path.stat().st_size >> 20} MiB long: that is no template."
                )
            try:
                templates[name] = path.read_text("utf-8")
            except UnicodeDecodeError:
                raise TokenizerError(f"{path.name} is not valid UTF-8.") from None
    return templates
