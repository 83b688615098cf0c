import random

import numpy as np
import pytest
import sentencepiece

from jaxlm.data import tokenizers
from jaxlm.errors import InputError

HARD = [
  "",
  "plain text",
  "  two  spaces \n\n\n and   three\t\ttabs\n",
  "\n",
  " ",
  "<s>text</s><unk><pad><0x41>",
  "a\u2581b \u2581\u2581 c\u2581",
  "\0x\0 \x01\x1b[0m \x7f",
  "\r\n\x0b\x0c\x85\u2028\u2029\ufeff",
  "e\u0301 \u00e9 \u212b \ufb01 \uff21 \u00bd",  # what NFKC would fold
  "\u4f60\u597d \u0645\u0631\u062d\u0628\u0627 \U0001f99c\u200d\U0001f3f3\ufe0f",
  "\ufffd \U0010ffff \u2047",
  " " * 70 + "x" * 5000,
]


@pytest.mark.parametrize("text", HARD)
def test_hard_text_comes_back(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
  assert not {tokenizer.bos, tokenizer.eos} & set(ids)
  tokenizers.check_round_trip(tokenizer, text, ids, "here")


def test_real_and_random_text_comes_back(tokenizer, plays):
  rng = random.Random(0)
  letters = [chr(c) for c in range(0x3000) if not 0xD800 <= c < 0xE000]
  noise = ["".join(rng.choices(letters, k=200)) for _ in range(50)]
  for text in plays[::6] + noise:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


def test_specials_are_no_text(tokenizer):
  lengths = tokenizer.byte_lengths()
  assert lengths.shape == (tokenizer.vocab,)
  assert lengths.dtype == np.int32
  assert lengths[[tokenizer.bos, tokenizer.eos]].tolist() == [0, 0]
  ids = [tokenizer.bos, *tokenizer.encode("a b"), tokenizer.eos]
  assert tokenizer.decode(ids) == "a b"


def test_what_all_tokenizers_tell(tokenizer):
  assert tokenizer.stops == {tokenizer.eos}
  assert tokenizer.add_bos
  assert not tokenizer.adds_space
  assert tokenizer.chat_template is None
  assert tokenizers.notes(tokenizer) == []
  assert [len(piece) for piece in tokenizer.pieces] == list(tokenizer.byte_lengths())
  named = {tokenizer.bos_token: tokenizer.bos, tokenizer.eos_token: tokenizer.eos}
  assert tokenizer.specials == {text: index for text, index in named.items() if text}
  parts = [tokenizer.bos, "a b", tokenizer.eos, "", " c"]
  inside, after = tokenizer.encode("a b"), tokenizer.encode(" c")
  ids = [tokenizer.bos, *inside, tokenizer.eos, *after]
  assert tokenizer.encode_parts(parts) == ids
  each = [[tokenizer.bos], inside, [tokenizer.eos], [], after]
  assert tokenizer.encode_each(parts) == each
  assert tokenizer.decode(tokenizer.encode_parts(["to", "", "be", " or"])) == "tobe or"
  assert tokenizer.decode(ids) == "a b c"


def test_half_a_letter_decodes_to_the_replacement(tokenizer):
  ids = tokenizer.encode("\U0001f99c")
  assert "\ufffd" in tokenizer.decode(ids[:-1])


def test_an_id_beyond_the_vocabulary(tokenizer):
  with pytest.raises(InputError, match=f"{tokenizer.vocab + 5}.*{tokenizer.vocab} ids"):
    tokenizer.decode([0, tokenizer.vocab + 5])


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_training_is_deterministic(plays, kind):
  spec = tokenizers.SentencePiece(vocab=400, kind=kind)
  one, two, other = (
    tokenizers.build(spec, texts) for texts in (plays[:8], plays[:8], plays[8:16])
  )
  assert one.fingerprint() == two.fingerprint() != other.fingerprint()
  assert one.vocab == 400


def test_words_become_few_tokens(unigram, bpe, plays):
  text = "".join(plays)
  for tokenizer in (unigram, bpe):
    assert len(text.encode()) / len(tokenizer.encode(text)) > 2.2


def test_save_and_load(unigram, tmp_path):
  spec = tokenizers.SentencePiece(vocab=1024)
  tokenizers.save(unigram, tmp_path)
  loaded = tokenizers.load(spec, tmp_path)
  assert loaded.fingerprint() == unigram.fingerprint()
  assert loaded.encode("To be") == unigram.encode("To be")
  assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.model"]
  given = tokenizers.SentencePiece(model=str(tmp_path / "tokenizer.model"), vocab=1024)
  assert tokenizers.build(given, []).fingerprint() == unigram.fingerprint()


def test_bytes_need_no_file(tmp_path):
  tokenizers.save(tokenizers.ByteTokenizer(), tmp_path)
  assert not list(tmp_path.iterdir())
  spec = tokenizers.Bytes()
  assert tokenizers.load(spec, tmp_path).vocab == spec.vocab == 258


def test_a_missing_or_broken_model(tmp_path):
  with pytest.raises(InputError, match=r"tokenizer.*tokenizer\.model"):
    tokenizers.load(tokenizers.SentencePiece(), tmp_path)
  file = tmp_path / "x.model"
  with pytest.raises(InputError, match=r"data\.tokenizer\.model.*x\.model"):
    tokenizers.build(tokenizers.SentencePiece(model=str(file)), [])
  file.write_bytes(b"not a model")
  with pytest.raises(InputError, match=r"x\.model: not a SentencePiece"):
    tokenizers.build(tokenizers.SentencePiece(model=str(file)), [])


def test_a_model_of_another_size(unigram, tmp_path):
  tokenizers.save(unigram, tmp_path)
  spec = tokenizers.SentencePiece(model=str(tmp_path / "tokenizer.model"), vocab=2000)
  with pytest.raises(InputError, match=r"tokenizer\.vocab: 2000.*has 1024 ids"):
    tokenizers.build(spec, [])


def train_foreign(file, **options):
  settings = {"vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2}
  with file.open("wb") as model:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(["a small text of few letters " * 9]),
      model_writer=model,
      **settings | options,
    )
  return tokenizers.SentencePieceTokenizer(file.read_bytes(), str(file))


def test_a_lossy_model_is_refused_with_the_place(tmp_path):
  tokenizer = train_foreign(tmp_path / "default.model")
  text = "two  spaces"
  with pytest.raises(InputError, match=r"lossy: f\.txt, line 3, letter 4: ' spaces'"):
    tokenizers.check_round_trip(
      tokenizer, text, tokenizer.encode(text), "f.txt, line 3"
    )


@pytest.mark.parametrize("text", HARD)
def test_a_space_in_front_decodes_to_none(tmp_path, text):
  options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
  options |= {"byte_fallback": True, "vocab_size": 400}
  tokenizer = train_foreign(tmp_path / "space.model", **options)
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert tokenizer.adds_space
  added = tokenizer.byte_lengths()[ids].sum() - len(text.encode())
  assert added == (text != "")
  assert tokenizer.encode_parts([text, 1, "letters"])[: len(ids) + 1] == [*ids, 1]
  after = tokenizer.encode_parts(["x", 1, "letters"])
  assert b"".join(tokenizer.pieces[index] for index in after) == b" xletters"
  words = tokenizer.encode_each(["x", "y", 1, "", "z"])
  found = [b"".join(tokenizer.pieces[index] for index in ids) for ids in words]
  assert found == [b" x", b"y", b"", b"", b"z"]


def test_a_model_without_ends(tmp_path):
  with pytest.raises(InputError, match="bos id -1 and eos id -1"):
    train_foreign(tmp_path / "bare.model", bos_id=-1, eos_id=-1)


@pytest.mark.parametrize(("vocab", "told"), [(100, "smaller"), (50_000, "too high")])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_vocabulary_that_the_text_does_not_allow(plays, kind, vocab, told):
  spec = tokenizers.SentencePiece(vocab=vocab, kind=kind)
  with pytest.raises(InputError, match=rf"tokenizer\.vocab: .*{vocab}.*{told}"):
    tokenizers.build(spec, plays[:3])


@pytest.mark.parametrize("field", ["vocab", "train_bytes"])
def test_spec_names_the_field(field):
  with pytest.raises(InputError, match=f"tokenizer.{field}: 0"):
    tokenizers.SentencePiece(**{field: 0})
