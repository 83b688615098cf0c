import pytest
from tokenizers import Regex, pre_tokenizers

from jaxlm.errors import InputError
from jaxlm.interop import pretokenizers

TEXT = "12345 DON'T don't  x\n\n  y1 (z)\n"


def cut(pre, text):
  """Returns the words that the row of a name makes of a text."""
  steps = [
    pre_tokenizers.Split(Regex(pattern), "isolated")
    for pattern in pretokenizers.PRE[pre].patterns
  ]
  words = pre_tokenizers.Sequence(steps).pre_tokenize_str(text)
  return [word for word, _ in words]


@pytest.mark.parametrize(
  ("pre", "words"),
  [
    ("gpt-2", "12345| DON|'|T| don|'t| | x|\n\n | y|1| (|z|)|\n"),
    ("smollm", "1|2|3|4|5| DON|'|T| don|'t| | x|\n\n | y|1| (|z|)|\n"),
    ("llama-bpe", "123|45| DON|'T| don|'t| | x|\n\n| | y|1| (|z|)\n"),
    ("qwen2", "1|2|3|4|5| DON|'T| don|'t| | x|\n\n| | y|1| (|z|)\n"),
    ("gpt-4o", "123|45| DON'T| don't| | x|\n\n| | y|1| (|z|)\n"),
    ("tekken", "1|2|3|4|5| DON|'T| don|'t| | x|\n\n| | y|1| (|z|)\n"),
    ("deepseek-v3", "123|45| DON|'T| don|'t| | x|\n\n| | y|1| (|z|)\n"),
    ("bloom", "12345| DON'T| don't| | x|\n\n | y1| (|z|)\n"),
    ("default", "123|45| DON|'|T| don|'|t| | x|\n\n | y|1| |(|z|)|\n"),
  ],
)
def test_words(pre, words):
  assert cut(pre, TEXT) == words.split("|")


def test_letters_with_marks_are_one_word_where_the_row_says_so():
  text = "x\u0928\u092e\u0938\u094d\u0924\u0947"
  assert cut("qwen35", text) == [text]
  assert len(cut("qwen2", text)) > 1


@pytest.mark.parametrize("pre", list(pretokenizers.PRE))
def test_each_row_is_written_under_a_name_of_the_same_meaning(pre):
  words = pretokenizers.PRE[pre]
  step = pretokenizers.to_json(words)
  named = pretokenizers.name_of(step, whole_words=words.whole_words, name="x")
  assert pretokenizers.PRE[named][:2] == words[:2]


def test_other_spellings_of_the_same():
  level = {"type": "ByteLevel", "use_regex": True}
  digits = {"type": "Digits", "individual_digits": True}
  both = {"type": "Sequence", "pretokenizers": [digits, level]}
  for step, told in ((level, "gpt-2"), (both, "smollm")):
    assert pretokenizers.name_of(step, whole_words=False, name="x") == told
  (pattern,) = pretokenizers.PRE["qwen2"].patterns
  pattern = pattern.replace(
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
  )
  split = {"type": "Split", "pattern": {"Regex": pattern}}
  split |= {"behavior": "Removed", "invert": True}
  assert pretokenizers.name_of(split, whole_words=False, name="x") == "qwen2"
  with pytest.raises(InputError, match="the pre_tokenizer's step Split has no name"):
    pretokenizers.name_of(split | {"invert": False}, whole_words=False, name="x")
  split |= {"pattern": {"Regex": "[0-9]"}}
  with pytest.raises(InputError, match=r"no name in GGUF.*\[0-9\]"):
    pretokenizers.name_of(split, whole_words=False, name="x")


def test_an_unknown_name():
  with pytest.raises(InputError, match=r"x\.gguf.*'smollm9'.*known are bloom"):
    pretokenizers.words_of("smollm9", "x.gguf")
