"""How byte-level vocabularies cut text into words, by the names that GGUF files use.

A file names its way in `tokenizer.ggml.pre`; a wrong one gives other ids for the same
text without any error. Each name stands for regular expressions that are applied one
after the other, each to the pieces that the ones before it left.

Sources: the models' own tokenizer.json files; the names are llama.cpp's.
"""

import re
from typing import Any, NamedTuple

from jaxlm.errors import InputError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPELT_OUT = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = (
  rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|"
  rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}"
)
_ONE_DIGIT = _CL100K.replace("{1,3}", "")
_WITH_MARKS = _ONE_DIGIT.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
  r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{M}\p{N}]+"
)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
  rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
)
_CASED_ENDS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"
_O200K = (
  rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|"
  rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|"
  rf"\p{{N}}{{1,3}}|{_CASED_ENDS}"
)
_TEKKEN = rf"{_CASED}|\p{{N}}|{_CASED_ENDS}"
_NESTED = " ?[^(\\s|[.,!?…。，、।۔،])]+"  # noqa: RUF001 - as the file itself has it
_WORDS = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_V3 = (
  r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"
  r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _ENDS
)


class Words(NamedTuple):
  """How text becomes words, and what goes with it."""

  patterns: tuple[str, ...]
  """Regular expressions, in the order of their use."""
  whole_words: bool = False
  """Whether a word that is in the vocabulary is a token whatever the merges say."""
  add_bos: bool = False
  """Whether a text is started with bos where the file does not say."""


_DEFAULT = Words((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
_DIGITS_FIRST = Words((r"\p{N}", _GPT2))
_LLAMA3 = Words((_CL100K,), whole_words=True, add_bos=True)

# The first of equal rows is the name that is written.
PRE = {
  "gpt-2": Words((_GPT2,)),
  "phi-2": Words((_GPT2,)),
  "mpt": Words((_GPT2,)),
  "olmo": Words((_GPT2,)),
  "jais": Words((_GPT2,)),
  "trillion": Words((_GPT2,)),
  "exaone4": Words((_GPT2,)),
  "smollm": _DIGITS_FIRST,
  "starcoder": _DIGITS_FIRST,
  "refact": _DIGITS_FIRST,
  "command-r": _DIGITS_FIRST,
  "codeshell": _DIGITS_FIRST,
  "exaone": _DIGITS_FIRST,
  "minerva-7b": _DIGITS_FIRST,
  "llama-bpe": _LLAMA3,
  "llama3": _LLAMA3,
  "llama-v3": _LLAMA3,
  "falcon3": _LLAMA3,
  "falcon-h1": _LLAMA3,
  "lfm2": _LLAMA3,
  "pixtral": _LLAMA3,
  "dbrx": Words((_CL100K,)),
  "smaug-bpe": Words((_CL100K,)),
  "glm4": Words((_CL100K,)),
  "chatglm-bpe": Words((_CL100K,)),
  "qwen2": Words((_ONE_DIGIT,)),
  "deepseek-r1-qwen": Words((_ONE_DIGIT,)),
  "stablelm2": Words((_ONE_DIGIT,)),
  "megrez": Words((_ONE_DIGIT,)),
  "hunyuan": Words((_ONE_DIGIT,)),
  "grok-2": Words((_ONE_DIGIT,)),
  "qwen35": Words((_WITH_MARKS,)),
  "gpt-4o": Words((_O200K,)),
  "llama4": Words((_O200K,)),
  "tekken": Words((_TEKKEN,), whole_words=True, add_bos=True),
  "bloom": Words((_WORDS,)),
  "poro-chat": Words((_WORDS,)),
  "gpt3-finnish": Words((_WORDS,)),
  "viking": Words((_WORDS, r"\p{N}")),
  "deepseek-v3": Words((r"\p{N}{1,3}", _HAN_KANA, _V3)),
  "deepseek-coder": Words((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}")),
  "falcon": Words((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
  "default": _DEFAULT,
}


def words_of(pre: str, name: str) -> Words:
  """Returns the row of a name; raises InputError for an unknown one."""
  if pre not in PRE:
    raise InputError(
      f"{name}: tokenizer.ggml.pre is {pre!r}, and its way to cut text is not known; "
      f"known are {', '.join(sorted(PRE))}."
    )
  return PRE[pre]


def to_json(words: Words) -> dict[str, Any]:
  """Returns the `pre_tokenizer` of a tokenizer.json."""
  steps: list[dict[str, Any]] = [
    {
      "type": "Split",
      "pattern": {"Regex": pattern},
      "behavior": "Isolated",
      "invert": False,
    }
    for pattern in words.patterns
  ]
  letters = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
  return {
    "type": "Sequence",
    "pretokenizers": [*steps, {"type": "ByteLevel"} | letters],
  }


def name_of(step: dict[str, Any] | None, *, whole_words: bool, name: str) -> str:
  """Returns the name that a GGUF file has for a `pre_tokenizer`.

  Raises:
    InputError: it has none.
  """
  told = [] if step is None else step.get("pretokenizers", [step])
  patterns = tuple(pattern for one in told for pattern in _patterns(one, name))
  for pre, words in PRE.items():
    if (words.patterns, words.whole_words) == (patterns, whole_words):
      return pre
  raise InputError(
    f"{name}: no name in GGUF is known for its pre_tokenizer {patterns} with "
    f"ignore_merges={whole_words}; known are {', '.join(sorted(PRE))}."
  )


def _patterns(step: dict[str, Any], name: str) -> list[str]:
  """Returns the expressions of a step of a tokenizer.json."""
  kind = step["type"]
  if kind == "ByteLevel":
    return [_GPT2] if step.get("use_regex", True) else []
  if kind == "Digits":
    return [r"\p{N}" if step["individual_digits"] else r"\p{N}+"]
  way = (step.get("behavior"), step.get("invert"))
  if kind == "Split" and way in (("Isolated", False), ("Removed", True)):
    pattern = step["pattern"]
    text = pattern.get("Regex") or re.escape(pattern["String"])
    text = text.replace(_SPELT_OUT, _CONTRACTIONS).replace(_NESTED, _WORDS)
    return [_GPT2 if f"{text}|\\s+" == _GPT2 else text]
  raise InputError(f"{name}: the pre_tokenizer's step {kind} has no name in GGUF.")
