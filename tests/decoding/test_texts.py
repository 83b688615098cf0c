import functools
import json
import re

import pytest
from models.specs import decoder, heads, params_of

from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.decoding.constraints import (
  JsonSchema,
  Regex,
  Vocabulary,
  compile_constraint,
)
from jaxlm.decoding.generate import Generation, Options
from jaxlm.decoding.sampling import Sampling
from jaxlm.decoding.texts import EVERY, Ends, write
from jaxlm.errors import InputError
from jaxlm.models.spec import GLU, LM, Block

# The model has more ids than the tokenizer, as a rounded vocabulary has.
MODEL = LM(
  vocab=272,
  dim=16,
  pattern=(Block(mixer=heads(2), mlp=GLU(hidden=32)),),
  repeats=2,
)
TOKENIZER = ByteTokenizer()
PROMPTS = [TOKENIZER.encode(text) for text in ("Hear ", "Enter KING", "ä")]
PRINTED = tuple(range(32, 127))
LETTERS = [Sampling(seed=seed, allowed=PRINTED) for seed in range(3)]


@functools.cache
def params():
  return params_of(decoder(MODEL))


def begin(samplings=LETTERS, tokens=40, **options):
  chosen = Options(tokens=tokens, stops=TOKENIZER.stops, **options)
  return Generation(decoder(MODEL), params(), PROMPTS, samplings, chosen)


@functools.cache
def free():
  return [row.text for row in write(begin(), TOKENIZER)]


def test_texts_are_what_follows_the_prompts():
  rows = begin().finish()
  assert free() == [bytes(row.tokens).decode() for row in rows]
  assert all(len(text) == 40 for text in free())


@pytest.mark.parametrize("at", [0, 1, EVERY - 1, EVERY, 30])
def test_a_text_ends_before_a_stop_string(at):
  """Which is found wherever it lies between two looks, and in its own row."""
  string = free()[1][at : at + 3]
  found = write(begin(), TOKENIZER, Ends(strings=(string, "never met")))
  for text, row in zip(free(), found, strict=True):
    before, met, _ = text.partition(string)
    assert row.text == before
    assert row.ended == ("string" if met else "length")
    assert len(row.row.tokens) == len(before) + len(met)
    assert len(row.row.model) == len(row.row.tokens)
  assert found[1].ended == "string"


def test_a_stop_string_before_a_stop_token_in_one_look_is_the_end():
  rows = begin().finish()
  string, stop = free()[1][1:3], rows[1].tokens[5]
  options = Options(tokens=40, stops=(stop,))
  growing = Generation(decoder(MODEL), params(), PROMPTS, LETTERS, options)
  found = write(growing, TOKENIZER, Ends(strings=(string,)))[1]
  assert (found.text, found.ended) == (free()[1][:1], "string")
  assert len(found.row.tokens) == len(found.row.model) == 3


def test_the_first_of_several_stop_strings_ends():
  text = free()[0]
  ends = Ends(strings=(text[20:22], text[10:12]))
  found = write(begin(), TOKENIZER, ends)[0].text
  assert found == text[: min(text.find(s) for s in ends.strings)]


def test_each_token_of_a_text_is_told():
  told = []
  write(begin(tokens=20), TOKENIZER, tell=told.append)
  assert told == [8, 16, 20]


def test_a_constraint_binds_every_row():
  spec = Regex(pattern=r"[a-c]{2,4}-[0-9]{3}")
  bound = compile_constraint(spec, Vocabulary(TOKENIZER))
  samplings = [Sampling(seed=seed) for seed in range(3)]
  found = write(begin(samplings), TOKENIZER, Ends(constraint=bound))
  for row in found:
    assert re.fullmatch(spec.pattern, row.text), row.text
    assert row.ended == "constraint"
  assert len({row.text for row in found}) == 3
  again = write(begin(samplings), TOKENIZER, Ends(constraint=bound))
  assert [row.text for row in again] == [row.text for row in found]


def test_a_schema_s_text_is_json():
  schema = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
  }
  spec = JsonSchema(schema=json.dumps(schema))
  bound = compile_constraint(spec, Vocabulary(TOKENIZER))
  samplings = [Sampling(seed=seed) for seed in range(3)]
  for row in write(begin(samplings, 200), TOKENIZER, Ends(constraint=bound)):
    assert list(json.loads(row.text)) == ["ok"]


def test_what_cannot_be_written():
  bound = compile_constraint(Regex(pattern="[0-9]+"), Vocabulary(TOKENIZER))
  with pytest.raises(InputError, match="stop string: it is empty"):
    write(begin(), TOKENIZER, Ends(strings=("a", "")))
  waiting = begin([Sampling(min_tokens=3)] * 3)
  with pytest.raises(InputError, match="min_tokens: the constraint says"):
    write(waiting, TOKENIZER, Ends(constraint=bound))
  with pytest.raises(InputError, match="min_tokens: it cannot hold back stop strings"):
    write(waiting, TOKENIZER, Ends(strings=("a",)))
  letters = begin([Sampling(allowed=tuple(b"abc"))] * 3)
  with pytest.raises(InputError, match="row 0: what the constraint lets come"):
    write(letters, TOKENIZER, Ends(constraint=bound))
