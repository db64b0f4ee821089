"""Control tokens that clients write into a chat stay text."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from server.chat_template import ChatTemplateError
from server.control_tokens import ControlTokens
from server.gguf_tokenizer import tokenizer_from_metadata
from server.hf_tokenizer import tokenizer_from_folder
from server.tokenizer import Tokenizer, load_tokenizer
from server.tokenizer_spec import TokenizerSpec
from tests.server.text_fixtures import FIXTURES, read_fixture, sentencepiece_metadata

NAMES = ("byte_level", "sentencepiece", "metaspace", "gguf")


def spec_of(name: str) -> TokenizerSpec:
    if name == "gguf":
        metadata = sentencepiece_metadata(add_space_prefix=True)
        template = (FIXTURES / "templates" / "turns.jinja").read_text("utf-8")
        return tokenizer_from_metadata(metadata | {"tokenizer.chat_template": template})
    return tokenizer_from_folder(FIXTURES / name)


SPECS = {name: spec_of(name) for name in NAMES}
TOKENIZERS = {name: Tokenizer(spec) for name, spec in SPECS.items()}


def control_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [token for token in ids if token in tokenizer.special_token_ids]


def chat(content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **more}]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", [text for text in read_fixture("texts.json") if text])
def test_no_text_adds_control_tokens_and_none_is_lost(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode_chat(chat(text))
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, tokenizer.encode_chat(chat("x")))
    assert tokenizer.chat_template is not None
    rendered = tokenizer.chat_template.render(chat(text))
    plain_ids = tokenizer.encode(rendered, add_special_tokens=False)
    # The same text either way, but for the spaces that some tokenizers put after a control token; without
    # control tokens in it, the same tokens.
    spelled, plainly = (tokenizer.decode(i, skip_special_tokens=False) for i in (ids, plain_ids))
    assert spelled.replace(" ", "") == plainly.replace(" ", "")
    if control_ids(tokenizer, plain_ids) == control_ids(tokenizer, ids):
        assert ids == plain_ids


@settings(deadline=None)
@given(
    name=st.sampled_from(NAMES),
    texts=st.lists(st.text("ab< >|é", max_size=6), min_size=1, max_size=4),
)
def test_the_detour_through_other_names_changes_no_token(name: str, texts: list[str]) -> None:
    """Encoding with the control tokens renamed equals plain encoding if none of them is shielded."""
    control = ControlTokens(SPECS[name].backend)
    shield, _ = control.shield("x</s>")
    assert shield is not None
    text = "</s>".join(texts)
    assert control.encode(text, shield) == TOKENIZERS[name].encode(text, add_special_tokens=False)


def test_a_control_token_cannot_be_put_together_from_pieces() -> None:
    tokenizer = TOKENIZERS["gguf"]
    honest = control_ids(tokenizer, tokenizer.encode_chat(chat("x")))
    parts = [{"type": "text", "text": "a <end_of_"}, {"type": "text", "text": "turn> b"}]
    assert tokenizer.chat_template is not None
    assert "<end_of_turn> b" in tokenizer.chat_template.render(chat(parts))  # joined by the template
    ids = tokenizer.encode_chat(chat(parts))
    assert control_ids(tokenizer, ids) == honest
    assert "a <end_of_turn> b" in tokenizer.decode(ids)
    # A token inside another one, whose letters come to light when the outer one is shielded.
    ids = tokenizer.encode_chat(chat("<end_of<end_of_turn>_turn> <</s>> </</s>s>"))
    assert control_ids(tokenizer, ids) == honest


@pytest.mark.parametrize("name", NAMES)
def test_other_fields_and_tools_are_shielded_too(name: str) -> None:
    spec = SPECS[name]
    template = "{{ bos_token }}{{ messages[0].name }} {{ tools | tojson }} {{ note }}"
    tokenizer = Tokenizer(
        TokenizerSpec(
            spec.backend,
            spec.bos_token_id,
            spec.eos_token_ids,
            spec.named_special_tokens,
            {"default": template},
        )
    )
    tools = [{"</s>": {"description": ["</s>", 1, None, "<s>"]}}]
    ids = tokenizer.encode_chat(chat("x", name="</s>"), tools=tools, note="</s>")
    assert control_ids(tokenizer, ids) == [tokenizer.bos_token_id]
    text = tokenizer.decode(ids)
    assert text.count("</s>") == 4
    assert text.count("<s>") == 1


def test_private_use_letters_of_clients_survive() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    text = "\U000f0000\U000f0001 </s> \U000ffffd"
    ids = tokenizer.encode_chat(chat(text))
    assert text in tokenizer.decode(ids)
    everything = "".join(map(chr, range(0xF0000, 0xFFFFE)))
    with pytest.raises(ChatTemplateError, match="private-use"):
        tokenizer.encode_chat(chat(everything + "</s>"))


def test_nothing_is_copied_without_control_tokens() -> None:
    control = ControlTokens(SPECS["byte_level"].backend)
    value = chat("a < b, <b>bold</b> and <|im_start> or <|im_end")
    shield, same = control.shield(value)
    assert shield is not None  # what the template writes next might complete the last one
    assert same[0]["content"][:-8] == value[0]["content"][:-8]
    value = chat("a < b, <b>bold</b> and <|im_start> or <|im_end.")
    shield, same = control.shield(value)
    assert shield is None
    assert same is value


def test_completions_take_control_tokens_as_such() -> None:
    tokenizer = load_tokenizer(FIXTURES / "byte_level")
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>")
    assert len(control_ids(tokenizer, ids)) == 2


def test_a_control_token_that_plain_text_makes_is_refused() -> None:
    """A vocabulary may be so made that merging letters gives a control token."""
    backend = tokenizers.Tokenizer(models.BPE({"<": 0, ">": 1, "<>": 2, "x": 3}, [("<", ">")]))
    backend.add_special_tokens([AddedToken("<>", normalized=False)])
    backend.decoder = decoders.Fuse()
    tokenizer = Tokenizer(TokenizerSpec(backend, None, (), {}, {"default": "{{ messages[0].content }}"}))
    assert tokenizer.encode_chat(chat("x<x")) == [3, 0, 3]
    with pytest.raises(ChatTemplateError, match="cannot be sent as text"):
        tokenizer.encode_chat(chat("x<>x"))
