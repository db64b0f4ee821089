"""How text is cut into words before byte-pair merging, by the name that a GGUF file gives
(``tokenizer.ggml.pre``).

Each name stands for one or more regular expressions, applied one after the other: each cuts the pieces that
the one before left, and what no expression matches stays as a piece. The expressions are those of the
models' original tokenizers. llama.cpp matches them, but for ``tekken`` and ``gpt-4o``, which it approximates
around combining marks.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

from server.tokenizer_spec import TokenizerError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SINGLE_DIGITS = r"\p{N}"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# A word with at most one leading mark, digits in threes or singly, marks with their line breaks.
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _TAIL
# Words are also cut where a capital follows a small letter.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_MARKS_OR_PATHS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _TAIL
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    + _MARKS_OR_PATHS
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
) + _MARKS_OR_PATHS
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|" + _TAIL,
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """Regular expressions, and two properties that go with them.

    Attributes:
        ignore_merges: a word that is itself a token is taken as it is, whatever the merges say.
        adds_bos: prompts start with the BOS token unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """Cuts text into words and maps their bytes to GPT-2's printable letters."""
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])


_DIGITS_THEN_GPT2 = PreTokenizer((_SINGLE_DIGITS, _GPT2))
_KINDS = {
    PreTokenizer((_GPT2,)): "gpt-2 gpt2 mpt olmo jais trillion granite-docling phi-2 gigachat mellum exaone4",
    _DIGITS_THEN_GPT2: "smollm starcoder refact command-r codeshell exaone minerva-7b",
    PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True): (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2"
    ),
    PreTokenizer((_LLAMA3,)): "dbrx smaug-bpe chatglm-bpe",
    PreTokenizer((_LLAMA3,), ignore_merges=True): "glm4",
    PreTokenizer((_QWEN2,)): "qwen2 deepseek-r1-qwen stablelm2 hunyuan megrez kormo grok-2 solar-open",
    PreTokenizer((_QWEN35,)): "qwen35",
    PreTokenizer((_TEKKEN,), ignore_merges=True, adds_bos=True): "tekken",
    PreTokenizer((_GPT4O,)): "gpt-4o llama4 kanana2",
    PreTokenizer(_DEEPSEEK3): "deepseek-v3 hunyuan-dense",
    PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")): "deepseek-coder",
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")): "falcon",
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")): "default",
}
PRE_TOKENIZERS = {name: kind for kind, names in _KINDS.items() for name in names.split()}


def pre_tokenizer_named(name: str) -> PreTokenizer:
    """The pre-tokenizer of a GGUF file.

    Raises:
        TokenizerError: an unknown name: guessing would silently give the model wrong tokens.
    """
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        raise TokenizerError(
            f"The GGUF file asks for the pre-tokenizer {name!r}, which is not known here. Known: "
            f"{', '.join(sorted(PRE_TOKENIZERS))}. Serve the model's folder in Hugging Face format instead."
        ) from None
