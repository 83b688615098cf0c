import dataclasses
import json
import shutil

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from vocabularies import MAKERS, NAMED, unigram, write

from jaxlm import config
from jaxlm.data import corpus, pieces, pretrained, tokenizers
from jaxlm.data.pretrained import Pretrained
from jaxlm.errors import InputError

HARD = [
  "",
  "plain text",
  "  two  spaces \n\n\n and   three\t\ttabs\n",
  "\n",
  " ",
  " a space first",
  "<|begin|>text<|end|><unk><0x41>",
  "tool<call>call <call> \n<call> <\u00e9>",
  "a\u2581b \u2581\u2581 c\u2581",
  "\u2581",
  "\r\n\x0b\x0c\x85\u2028\ufeff",
  "e\u0301 \u00e9 \u212b \ufb01",
  "\u4f60\u597d \u0120 \u0645\u0631 \U0001f99c\u200d\U0001f3f3\ufe0f \ufffd",
]


@pytest.fixture(scope="module")
def made(plays):
  return {name: maker(plays[:12]) for name, maker in MAKERS.items()}


@pytest.fixture(params=list(MAKERS))
def kind(request):
  return request.param


@pytest.fixture
def tokenizer(made, kind, tmp_path):
  return tokenizers.read(write(tmp_path / "model", made[kind]), None, "here")


@pytest.mark.parametrize("text", HARD)
def test_hard_text_comes_back(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  space = len(b"".join(tokenizer.pieces[index] for index in ids)) - len(text.encode())
  assert space == (tokenizer.adds_space and bool(text))
  assert tokenizer.byte_lengths()[ids].sum() == len(text.encode()) + space
  assert not set(tokenizer.specials.values()) & set(ids)
  tokenizers.check_round_trip(tokenizer, text, ids, "here")


def test_real_text_has_the_library_s_ids(made, tokenizer, kind, plays):
  lengths = []
  for text in plays[::6]:
    text = text.strip()
    ids = tokenizer.encode(text)
    assert ids == made[kind].encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    lengths.append(len(text) / len(ids))
  assert np.mean(lengths) > 1.5


def test_control_tokens_are_no_text(made, tokenizer, kind):
  """The library itself takes them out of any text, unless it is told not to."""
  text = "a<|end|>b <|turn|>"
  ids = tokenizer.encode(text)
  told = Tokenizer.from_str(made[kind].to_str())
  told.encode_special_tokens = True
  assert ids == told.encode(text, add_special_tokens=False).ids
  assert not {2, 3} & set(ids)
  assert {2, 3} <= set(made[kind].encode(text).ids)
  assert {"<|begin|>": 1, "<|end|>": 2, "<|turn|>": 3}.items() <= (
    tokenizer.specials.items()
  )
  assert (tokenizer.bos, tokenizer.eos, tokenizer.stops) == (1, 2, {2})
  lengths = tokenizer.byte_lengths()
  assert lengths.shape == (tokenizer.vocab,)
  assert lengths.dtype == np.int32
  assert not lengths[:4].any()
  assert tokenizer.decode([1, *tokenizer.encode("a b"), 2]) == "a b"


def test_a_control_token_s_letters_are_words_like_others(made, tmp_path):
  more = Tokenizer.from_str(made["bytes"].to_str())
  more.add_special_tokens([AddedToken("hehe|", normalized=False)])
  one = tokenizers.read(write(tmp_path, more), None, "here")
  assert len(more.encode("hehe|").ids) == 1
  assert one.encode("hehe|") == made["bytes"].encode("hehe|").ids
  assert one.pieces[one.encode("hehe|")[0]] == b"he"


def test_a_model_that_has_control_tokens_for_words(plays, tmp_path):
  made = unigram(plays[:12])
  tokenizer = tokenizers.read(write(tmp_path, made), None, "here")
  text = "to<|end|> be<|end|><|end|>"
  made.encode_special_tokens = True
  assert 2 in made.encode(text).ids
  ids = tokenizer.encode(text)
  assert 2 not in ids
  assert tokenizer.decode(ids) == text
  text = "a\u4e16b"
  with pytest.raises(InputError, match=r"lossy: here, letter 1: '\u4e16b'"):
    tokenizers.check_round_trip(tokenizer, text, tokenizer.encode(text), "here")


def test_parts_have_the_ids_of_the_whole(made, tokenizer, kind):
  """Spaces in front stand where the library puts them in the text with its tokens."""
  for parts in (
    [1, "one two", 2, "three", 3, " four\n", 2],
    ["one", 2, "two"],
    [1, 2, "x"],
    ["one ", 3, "  two"],
  ):
    names = {index: text for text, index in tokenizer.specials.items()}
    whole = "".join(names[p] if isinstance(p, int) else p for p in parts)
    expected = made[kind].encode(whole, add_special_tokens=False).ids
    assert tokenizer.encode_parts(parts) == expected
  assert tokenizer.encode_parts([]) == tokenizer.encode_parts([""]) == []


def test_words_right_after_words_go_on_with_them(tokenizer):
  parts = ["on", "", "e tw", "o", 3, "thr", " ", "ee", 2]
  each = tokenizer.encode_each(parts)
  assert [i for ids in each for i in ids] == tokenizer.encode_parts(parts)
  found = [b"".join(tokenizer.pieces[i] for i in ids).decode() for ids in each]
  assert "".join(found[:4]).lstrip() == "one two"
  assert "".join(found[5:]).lstrip() == "thr ee"
  assert found[1:4] == ["", "e tw", "o"]
  assert found[6:] == [" ", "ee", ""]


@pytest.mark.parametrize("kind", ["first", "never", "bytes"])
def test_an_added_word_at_the_start_takes_the_place_of_the_space(made, tokenizer, kind):
  text = "<call>word"
  ids = tokenizer.encode(text)
  assert ids == made[kind].encode(text, add_special_tokens=False).ids
  assert tokenizer.decode(ids) == text


def test_a_control_token_takes_the_spaces_that_are_its_own(made, tmp_path):
  tokenizer = tokenizers.read(write(tmp_path, made["bytes"]), None, "here")
  late = tokenizer.specials["<|late|>"]
  ids = tokenizer.encode_parts(["a ", late, "  b"])
  assert ids == made["bytes"].encode("a <|late|>  b").ids
  assert ids == [*tokenizer.encode("a "), late, *tokenizer.encode("b")]


def test_save_and_load(made, kind, tmp_path):
  settings = NAMED | {
    "chat_template": "{{ messages }}",
    "additional_special_tokens": ["<|turn|>"],
    "add_bos_token": False,
  }
  folder = write(
    tmp_path / "a",
    made[kind],
    tokenizer_config=settings,
    generation_config={"eos_token_id": [2, 3]},
  )
  vocab = made[kind].get_vocab_size() + 7
  spec = Pretrained(path=str(folder), vocab=vocab)
  one = tokenizers.build(spec, [])
  (tmp_path / "b").mkdir()
  tokenizers.save(one, tmp_path / "b")
  found = sorted(file.name for file in (tmp_path / "b").iterdir())
  assert found == ["tokenizer.json", "tokenizer_config.json"]
  gone = dataclasses.replace(spec, path="gone")
  again = dataclasses.replace(spec, path=str(tmp_path / "b"))
  for two in (tokenizers.load(gone, tmp_path / "b"), tokenizers.build(again, [])):
    assert two.fingerprint() == one.fingerprint()
    for name in ("vocab", "bos", "eos", "stops", "specials", "add_bos", "bos_token"):
      assert vars(two)[name] == vars(one)[name]
    assert two.chat_template == "{{ messages }}"
    assert two.pieces == one.pieces
    assert two.encode("to be, or") == one.encode("to be, or")
  assert one.stops == {2, 3}
  assert one.vocab == vocab
  assert one.pieces[-7:] == [b""] * 7


def test_the_fingerprint_tells_tokenizers_apart(made, tmp_path):
  folder = write(tmp_path / "a", made["bytes"])
  one, padded = (tokenizers.read(folder, vocab, "here") for vocab in (None, 900))
  ended = {"bos_token": "<|begin|>", "eos_token": "<|turn|>"}
  other = write(tmp_path / "b", made["bytes"], tokenizer_config=ended)
  two = tokenizers.read(other, None, "here")
  three = tokenizers.read(write(tmp_path / "c", made["first"]), None, "here")
  assert len({x.fingerprint() for x in (one, padded, two, three)}) == 4


def test_more_ids_than_the_model_has_rows(made, tmp_path):
  folder = write(tmp_path, made["bytes"])
  size = made["bytes"].get_vocab_size()
  for vocab in (size - 1, 3):
    spec = Pretrained(path=str(folder), vocab=vocab)
    with pytest.raises(InputError, match=rf"tokenizer\.json: {size} ids.* {vocab} of"):
      tokenizers.build(spec, [])
  with pytest.raises(InputError, match=r"data\.tokenizer\.vocab: 0"):
    Pretrained(path="x", vocab=0)


def test_what_begins_a_text(made, tmp_path):
  def add_bos(made, **settings):
    named = NAMED | settings
    return tokenizers.read(
      write(tmp_path, made, tokenizer_config=named), None, "here"
    ).add_bos

  plain = made["bytes"]
  starting = Tokenizer.from_str(plain.to_str())
  starting.post_processor = processors.TemplateProcessing(
    single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
  )
  assert not add_bos(plain)
  assert add_bos(starting)
  assert add_bos(plain, add_bos_token=True)
  assert not add_bos(starting, add_bos_token=False)
  assert 1 not in tokenizers.read(tmp_path, None, "here").encode("a")
  with pytest.raises(InputError, match="add_bos_token is 'yes'"):
    add_bos(plain, add_bos_token="yes")


@pytest.mark.parametrize(
  ("settings", "bos", "note"),
  [
    ({}, 2, "no bos of its own: documents begin with id 2 <|end|>"),
    ({"config": {"bos_token_id": 3}}, 3, "documents begin with id 3 <|turn|>"),
    ({"config": {"bos_token_id": 400}}, 2, "begin with id 2"),
  ],
)
def test_a_tokenizer_without_bos(made, tmp_path, settings, bos, note):
  folder = write(
    tmp_path, made["bytes"], tokenizer_config={"eos_token": "<|end|>"}, **settings
  )
  one = tokenizers.read(folder, None, "here")
  assert (one.bos, one.eos, one.bos_token) == (bos, 2, "")
  assert not one.add_bos
  assert note in tokenizers.notes(one)[0]


def test_a_space_in_front_is_told(made, tmp_path):
  told = tokenizers.notes(tokenizers.read(write(tmp_path, made["first"]), None, "here"))
  assert len(told) == 1
  assert told[0].startswith("a space in front of each text")


@pytest.mark.parametrize(
  ("settings", "eos", "stops"),
  [
    ({"tokenizer_config": {"eos_token": {"content": "<|end|>"}}}, 2, {2}),
    ({"special_tokens_map": {"eos_token": "<|turn|>"}}, 3, {3}),
    ({"special_tokens_map": {"eos_token": {"content": "<|turn|>"}}}, 3, {3}),
    ({"generation_config": {"eos_token_id": 3}}, 3, {3}),
    ({"generation_config": {"eos_token_id": [3, 2]}}, 3, {3, 2}),
    ({"config": {"eos_token_id": 3}}, 3, {3}),
    (
      {"config": {"eos_token_id": 1}, "generation_config": {"eos_token_id": 3}},
      3,
      {3},
    ),
    ({"tokenizer_config": NAMED, "generation_config": {"eos_token_id": 3}}, 2, {2, 3}),
  ],
)
def test_where_the_end_is_told(made, tmp_path, settings, eos, stops):
  settings = {"tokenizer_config": None} | settings
  one = tokenizers.read(write(tmp_path, made["bytes"], **settings), None, "here")
  assert (one.eos, one.stops) == (eos, stops)


@pytest.mark.parametrize(
  ("settings", "told"),
  [
    ({"tokenizer_config": {}}, r"tokenizer\.json: no end token.*eos_token_id"),
    ({"tokenizer_config": {"eos_token": "<x>"}}, "lacks eos_token '<x>'"),
    ({"tokenizer_config": {"eos_token": 3}}, r"config\.json: eos_token is 3"),
    ({"tokenizer_config": []}, r"tokenizer_config\.json: holds list"),
    ({"config": {"eos_token_id": "x"}}, "eos_token_id is 'x'"),
    ({"generation_config": {"eos_token_id": 99999}}, "eos_token_id 99999 is not below"),
    ({"tokenizer_config": NAMED | {"chat_template": 3}}, "chat_template is neither"),
    ({"tokenizer_config": NAMED | {"chat_template": [{}]}}, "chat_template is neither"),
    (
      {"tokenizer_config": NAMED | {"chat_template": [{"name": "a", "template": ""}]}},
      r"chat_template has \['a'\]; one must be called 'default'",
    ),
    ({"tokenizer_config": NAMED | {"added_tokens_decoder": [3]}}, "added_tokens_deco"),
  ],
)
def test_broken_settings_are_named(made, tmp_path, settings, told):
  folder = write(tmp_path, made["bytes"], **settings)
  with pytest.raises(InputError, match=told):
    tokenizers.read(folder, None, "here")


def test_settings_that_are_not_json(made, tmp_path):
  folder = write(tmp_path, made["bytes"])
  (folder / "tokenizer_config.json").write_text("{")
  with pytest.raises(InputError, match=r"tokenizer_config\.json: not JSON"):
    tokenizers.read(folder, None, "here")


def test_the_template_of_chats(made, tmp_path):
  named = [{"name": "tool", "template": "a"}, {"name": "default", "template": "b"}]
  for given, expected in (("x", "x"), (named, "b"), (None, None)):
    folder = write(
      tmp_path, made["bytes"], tokenizer_config=NAMED | {"chat_template": given}
    )
    assert tokenizers.read(folder, None, "here").chat_template == expected
  (tmp_path / "chat_template.jinja").write_text("file")
  assert tokenizers.read(folder, None, "here").chat_template == "file"


def test_words_become_control_tokens_where_they_are_named_so(made, tmp_path):
  named = {"additional_special_tokens": ["he"]}
  folder = write(tmp_path, made["bytes"], special_tokens_map=named)
  plain = tokenizers.read(write(tmp_path / "x", made["bytes"]), None, "here")
  one = tokenizers.read(folder, None, "here")
  (word,) = plain.encode("he")
  assert one.specials["he"] == word
  assert one.pieces[word] == b""
  assert word not in one.encode("hehe he")
  assert one.decode(one.encode("hehe he")) == "hehe he"


def test_what_would_vary_or_lose_ids_is_off(made, tmp_path, plays):
  data = json.loads(made["bytes"].to_str())
  data["model"]["dropout"] = 0.9
  data["truncation"] = {
    "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
  }  # fmt: skip
  folder = write(tmp_path, Tokenizer.from_str(json.dumps(data)))
  one = tokenizers.read(folder, None, "here")
  assert one.encode(plays[0]) == made["bytes"].encode(plays[0]).ids


DECODERS = {
  "WordPiece": {"type": "WordPiece", "prefix": "##", "cleanup": False},
  "none": None,
  "Replace": {"type": "Replace", "pattern": {"String": "_"}, "content": " "},
}


@pytest.mark.parametrize("name", list(DECODERS))
def test_an_inexact_decoder_is_refused_by_name(made, tmp_path, name):
  data = json.loads(made["bytes"].to_str()) | {"decoder": DECODERS[name]}
  folder = write(tmp_path, None)
  (folder / "tokenizer.json").write_text(json.dumps(data))
  with pytest.raises(InputError, match=rf"tokenizer\.json: decoder: {name}\. Only"):
    tokenizers.read(folder, None, "here")


def test_spaces_in_front_of_words_are_refused(made, tmp_path):
  made = Tokenizer.from_str(made["always"].to_str())
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="first")]
  )
  with pytest.raises(InputError, match="step 1, Metaspace, puts a space in front of"):
    tokenizers.read(write(tmp_path, made), None, "here")


HALF = '{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}'


@pytest.mark.parametrize("text", ["{", "[]", "{}", HALF])
def test_a_broken_tokenizer(tmp_path, text):
  folder = write(tmp_path, None)
  (folder / "tokenizer.json").write_text(text)
  with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer\.json"):
    tokenizers.read(folder, None, "here")


def test_a_folder_without_a_tokenizer(tmp_path):
  for field, read in (
    (r"data\.tokenizer\.path", lambda spec: tokenizers.build(spec, [])),
    ("tokenizer", lambda spec: tokenizers.load(spec, tmp_path)),
  ):
    with pytest.raises(InputError, match=f"{field}: neither tokenizer.json nor token"):
      read(Pretrained(path=str(tmp_path), vocab=9))


# Folders with tokenizer.model.


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_trained_model_s_folder_is_a_pretrained_one(request, kind, tmp_path):
  trained = request.getfixturevalue(kind)
  tokenizers.save(trained, tmp_path)
  spec = Pretrained(path=str(tmp_path), vocab=1030)
  one = tokenizers.build(spec, [])
  assert (one.vocab, trained.vocab) == (1030, 1024)
  assert (one.bos, one.eos, one.stops) == (trained.bos, trained.eos, {trained.eos})
  assert one.specials == trained.specials == {"<s>": 1, "</s>": 2}
  assert one.bos_token == trained.bos_token == "<s>"
  assert one.add_bos
  assert one.pieces[:1024] == trained.pieces
  for text in HARD:
    assert one.encode(text) == trained.encode(text)
  (tmp_path / "again").mkdir()
  tokenizers.save(one, tmp_path / "again")
  assert tokenizers.load(spec, tmp_path / "again").fingerprint() == one.fingerprint()


def test_settings_beside_a_model(bpe, tmp_path):
  tokenizers.save(bpe, tmp_path)
  word = bpe.encode(" the")
  assert len(word) == 1
  settings = {
    "eos_token": "<|im_end|>",
    "add_bos_token": False,
    "chat_template": "x",
    "added_tokens_decoder": {
      "1": {"content": "<s>", "special": True},
      str(word[0]): {"content": "\u2581the", "special": True},
      "1026": {"content": "<|im_end|>", "special": True},
    },
  }
  write(tmp_path, None, tokenizer_config=settings)
  one = tokenizers.read(tmp_path, None, "here")
  assert (one.vocab, one.eos, one.bos, one.add_bos) == (1027, 1026, 1, False)
  assert one.chat_template == "x"
  assert 1026 not in one.encode("<|im_end|>")
  assert word[0] not in one.encode("to the\u2581the the")
  assert one.decode(one.encode("to the the")) == "to the the"
  assert one.decode([1, *one.encode("a"), 1026]) == "a"
  (tmp_path / "again").mkdir()
  tokenizers.save(one, tmp_path / "again")
  two = tokenizers.read(tmp_path / "again", None, "here")
  assert (two.specials, two.eos, two.add_bos) == (one.specials, one.eos, False)
  settings["added_tokens_decoder"]["1"]["content"] = "<b>"
  write(tmp_path, None, tokenizer_config=settings)
  with pytest.raises(InputError, match="id 1 is '<s>', but '<b>'"):
    tokenizers.read(tmp_path, None, "here")


# The run's own use.


def test_rows_depend_on_the_files_and_not_on_their_place(
  made, jsonl, spec, plays, tmp_path
):
  folder = write(tmp_path / "a", made["bytes"])
  shutil.copytree(folder, tmp_path / "b")
  texts = [text[:30] for text in plays]
  source = jsonl("x.jsonl", texts)

  def prepare(name):
    tokenizer = Pretrained(path=str(tmp_path / name), vocab=512)
    data = spec(source, tokenizer=tokenizer, held_out=0.0, cache=str(tmp_path / "rows"))
    return corpus.prepare(data, "unused")

  one, two = prepare("a"), prepare("b")
  assert not one.report.reused
  assert two.report.reused
  assert one.fingerprint == two.fingerprint
  assert two.tokenizer.fingerprint() == one.tokenizer.fingerprint()
  row = one.train[0][0]
  tokens, segments = row["tokens"], row["segments"]
  first = tokens[segments == 1].tolist()
  assert (first[0], first[-1]) == (1, 2)
  assert one.tokenizer.decode(first) in texts
  shutil.rmtree(tmp_path / "a")
  settings = NAMED | {"eos_token": "<|turn|>"}
  write(tmp_path / "b", None, tokenizer_config=settings)
  assert prepare("b").fingerprint != one.fingerprint


def test_text_that_is_normalized_is_refused_with_the_place(made, jsonl, spec, tmp_path):
  folding = Tokenizer.from_str(made["bytes"].to_str())
  folding.normalizer = normalizers.NFC()
  folder = write(tmp_path / "a", folding)
  data = spec(
    jsonl("x.jsonl", ["plain", "e\u0301"]),
    tokenizer=Pretrained(path=str(folder), vocab=512),
    held_out=0.0,
  )
  with pytest.raises(InputError, match=r"lossy: .*x\.jsonl, line 2.*text in NFC"):
    corpus.prepare(data, tmp_path / "rows")


def test_the_command_line_takes_it(jsonl, spec):
  data = spec(jsonl("x.jsonl", ["a"]))
  data = config.override(data, ["tokenizer=Pretrained(path=/x/y,vocab=49152)"])
  assert data.tokenizer == Pretrained(path="/x/y", vocab=49152)


def test_files_of(made, tmp_path):
  folder = write(tmp_path, made["bytes"], config={})
  (folder / "README.md").write_text("no matter")
  (folder / "tokenizer.model").write_text("no matter")
  found = [file.name for file in pretrained.files_of(folder, "here")]
  assert found == ["config.json", "tokenizer.json", "tokenizer_config.json"]


def test_every_byte_has_its_letter(made, tmp_path):
  tokenizer = tokenizers.read(write(tmp_path, made["bytes"]), None, "here")
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  assert set(pieces.BYTE_LETTERS) == set(alphabet)
  assert set(tokenizer.pieces) >= {bytes([value]) for value in range(256)}
