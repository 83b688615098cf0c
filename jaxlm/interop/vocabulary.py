"""The vocabulary inside a GGUF file, to a tokenizer and back.

`gpt2` is byte-level BPE, read as a tokenizer.json; `llama` is SentencePiece's BPE, read
as a SentencePiece model. Control tokens and the chat template come along.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import gguf
from sentencepiece import sentencepiece_model_pb2 as protocol

from jaxlm.data.controls import Controls
from jaxlm.data.pretrained import JsonTokenizer
from jaxlm.data.sentencepieces import SentencePieceTokenizer
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import InputError
from jaxlm.interop import pretokenizers

_START = "tokenizer.ggml."
# GGUF took the numbers of SentencePiece's kinds of pieces.
Kind = gguf.TokenType
# Control tokens of these texts end a turn, whatever else the file says.
_ENDS = (
  "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>",
  "<|end_of_text|>", "<end_of_turn>", "<EOT>",
)  # fmt: skip
_BPE_BOS, _BPE_EOS = 1, 2


class _Vocabulary(NamedTuple):
  """What both kinds of vocabulary have."""

  tokens: list[str]
  """The texts of the ids."""
  kinds: list[int]
  """What each id is: see `Kind`."""


def tokenizer_of(fields: dict[str, Any], name: str) -> Tokenizer:
  """Returns the tokenizer of a GGUF file.

  Args:
    fields: the file's metadata, by key.
    name: the file, for errors.

  Raises:
    InputError: there is no vocabulary, or one of a kind or with a way to cut text that
      is not known, or it is broken.
  """
  kind = fields.get(f"{_START}model")
  readers = {"gpt2": _byte_level, "llama": _sentencepiece}
  if kind not in readers:
    raise InputError(
      f"{name}: tokenizer.ggml.model is {kind!r}; read are {', '.join(readers)}."
    )
  tokens = _needed(fields, "tokens", name)
  kinds = fields.get(f"{_START}token_type", [Kind.NORMAL] * len(tokens))
  if len(kinds) != len(tokens):
    raise InputError(
      f"{name}: tokenizer.ggml.token_type has {len(kinds)} elements, and there are "
      f"{len(tokens)} tokens."
    )
  return readers[kind](fields, _Vocabulary(tokens, kinds), name)


def _needed(fields: dict[str, Any], key: str, name: str) -> Any:
  if f"{_START}{key}" not in fields:
    raise InputError(f"{name}: tokenizer.ggml.{key} is missing.")
  return fields[f"{_START}{key}"]


def _byte_level(
  fields: dict[str, Any], vocabulary: _Vocabulary, name: str
) -> JsonTokenizer:
  pre = fields.get(f"{_START}pre", "default")
  words = pretokenizers.words_of(pre, name)
  merges = [_pair(merge) for merge in _needed(fields, "merges", name)]
  needed = {part for pair in merges for part in (*pair, "".join(pair))}
  ids: dict[str, int] = {}
  added = []
  for index, (token, kind) in enumerate(zip(*vocabulary, strict=True)):
    if kind == Kind.UNUSED and token not in needed:
      continue
    ids.setdefault(token, index)
    if kind in (Kind.CONTROL, Kind.USER_DEFINED) and ids[token] == index:
      flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
      special = {"special": kind == Kind.CONTROL}
      added.append({"id": index, "content": token} | flags | special)
  model = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": words.whole_words,
    "vocab": ids,
    "merges": merges,
  }
  decoder = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
  document = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": added,
    "normalizer": None,
    "pre_tokenizer": pretokenizers.to_json(words),
    "post_processor": None,
    "decoder": {"type": "ByteLevel"} | decoder,
    "model": model,
  }
  return JsonTokenizer(
    json.dumps(document, ensure_ascii=False),
    name,
    controls=_controls(fields, vocabulary, words.add_bos, name),
    vocab=len(vocabulary.tokens),
  )


def _pair(merge: str) -> list[str]:
  """Returns both sides of "a b"; a piece may begin with the space, not end with it."""
  at = merge.find(" ", 1)
  return [merge[:at], merge[at + 1 :]]


def _controls(
  fields: dict[str, Any], vocabulary: _Vocabulary, add_bos: bool, name: str
) -> Controls:
  """Returns the control tokens that a file names, and those known by their text."""
  tokens = vocabulary.tokens
  found = {key: _id(fields, f"{key}_token_id", tokens, name) for key in ("bos", "eos")}
  if fields[f"{_START}model"] == "llama":
    for key, index in (("bos", _BPE_BOS), ("eos", _BPE_EOS)):
      found[key] = index if found[key] is None else found[key]
  told = [_id(fields, f"{key}_token_id", tokens, name) for key in ("eot", "eom")]
  known = [
    index
    for index, (token, kind) in enumerate(zip(*vocabulary, strict=True))
    if kind == Kind.CONTROL and token in _ENDS
  ]
  bos, eos = found["bos"], found["eos"]
  return Controls(
    bos_token=None if bos is None else tokens[bos],
    eos_token=None if eos is None else tokens[eos],
    eos_ids=tuple(index for index in (*told, *known) if index is not None),
    add_bos=bool(fields.get(f"{_START}add_bos_token", add_bos)),
    chat_template=fields.get("tokenizer.chat_template"),
  )


def _id(fields: dict[str, Any], key: str, tokens: list[str], name: str) -> int | None:
  index = fields.get(f"{_START}{key}")
  if index is not None and not 0 <= index < len(tokens):
    raise InputError(
      f"{name}: tokenizer.ggml.{key} is {index}, and there are {len(tokens)} tokens."
    )
  return index


def _sentencepiece(
  fields: dict[str, Any], vocabulary: _Vocabulary, name: str
) -> SentencePieceTokenizer:
  scores = fields.get(f"{_START}scores", [0.0] * len(vocabulary.tokens))
  controls = _controls(fields, vocabulary, add_bos=True, name=name)
  model: Any = protocol.ModelProto()  # type: ignore[attr]
  for token, score, kind in zip(
    vocabulary.tokens, scores, vocabulary.kinds, strict=True
  ):
    model.pieces.add(piece=token, score=score, type=int(kind))
  trainer, normalizer = model.trainer_spec, model.normalizer_spec
  trainer.model_type = trainer.BPE
  trainer.vocab_size = len(vocabulary.tokens)
  trainer.byte_fallback = Kind.BYTE in vocabulary.kinds
  for index, (token, kind) in enumerate(zip(*vocabulary, strict=True)):
    if kind == Kind.UNKNOWN:
      trainer.unk_id, trainer.unk_piece = index, token
  trainer.bos_piece, trainer.eos_piece = controls.bos_token, controls.eos_token
  trainer.pad_id = -1
  normalizer.name = "identity"
  normalizer.add_dummy_prefix = bool(fields.get(f"{_START}add_space_prefix", True))
  normalizer.remove_extra_whitespaces = False
  return SentencePieceTokenizer(model.SerializeToString(), name, controls=controls)


def write_vocabulary(
  writer: gguf.GGUFWriter, tokenizer: Tokenizer, *, vocab: int
) -> None:
  """Writes a tokenizer into a GGUF file, padded to `vocab` ids.

  Raises:
    InputError: GGUF has no way to say it, or it has more ids.
  """
  if tokenizer.vocab > vocab:
    raise InputError(
      f"tokenizer: its {tokenizer.vocab} ids are more than the model's {vocab}."
    )
  if isinstance(tokenizer, JsonTokenizer):
    _write_byte_level(writer, tokenizer, vocab)
  elif isinstance(tokenizer, SentencePieceTokenizer):
    _write_sentencepiece(writer, tokenizer, vocab)
  else:
    raise InputError(
      "tokenizer: plain bytes have no name in GGUF; byte-level BPE (tokenizer.json) "
      "and SentencePiece of kind 'bpe' have."
    )
  writer.add_eos_token_id(tokenizer.eos)
  # A tokenizer without bos repeats its end token, which is no news to a reader.
  if tokenizer.bos_token or tokenizer.bos != tokenizer.eos:
    writer.add_bos_token_id(tokenizer.bos)
  _write_stops(writer, tokenizer)
  writer.add_add_bos_token(tokenizer.add_bos)
  writer.add_add_space_prefix(tokenizer.adds_space)
  if tokenizer.chat_template is not None:
    writer.add_chat_template(tokenizer.chat_template)


def _write_stops(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
  """Writes what ends a turn beside eos; readers know some by their text alone."""
  known = {tokenizer.specials[text] for text in _ENDS if text in tokenizer.specials}
  others = sorted(tokenizer.stops - known - {tokenizer.eos})
  if len(others) > 2:
    raise InputError(
      f"tokenizer: the ids {others} end a turn, and GGUF has room for two beside eos."
    )
  for add, index in zip(
    (writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False
  ):
    add(index)


def _write_byte_level(
  writer: gguf.GGUFWriter, tokenizer: JsonTokenizer, vocab: int
) -> None:
  data = json.loads(tokenizer.document)
  model = data["model"]
  _check_byte_level(data, tokenizer)
  pre = pretokenizers.name_of(
    data["pre_tokenizer"],
    whole_words=bool(model.get("ignore_merges")),
    name="tokenizer.json",
  )
  texts = {index: token for token, index in model["vocab"].items()}
  kinds = dict.fromkeys(texts, int(Kind.NORMAL))
  for token in data.get("added_tokens", []):
    texts[token["id"]] = token["content"]
    kinds[token["id"]] = int(Kind.USER_DEFINED)
  kinds |= dict.fromkeys(tokenizer.specials.values(), int(Kind.CONTROL))
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(pre)
  writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(vocab)])
  writer.add_token_types([kinds.get(i, int(Kind.UNUSED)) for i in range(vocab)])
  writer.add_token_merges(
    [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
  )


def _check_byte_level(data: dict[str, Any], tokenizer: JsonTokenizer) -> None:
  """Raises InputError for what a GGUF file could not say, so ids would differ."""
  refused = None
  if data["model"]["type"] != "BPE" or data["decoder"]["type"] != "ByteLevel":
    refused = (
      f"{data['model']['type']} with the decoder {data['decoder']['type']}; give the "
      "model's tokenizer.model instead"
    )
  elif tokenizer.adds_space:
    refused = "a space in front of each text"
  elif lossy := [kind for kind in _normalizers(data) if kind != "NFC"]:
    refused = f"the normalizer {', '.join(lossy)}"
  if refused:
    raise InputError(f"tokenizer.json: GGUF cannot say {refused}.")


def _normalizers(data: dict[str, Any]) -> Iterator[str]:
  step = data.get("normalizer")
  if step is not None:
    yield from (one["type"] for one in step.get("normalizers", [step]))


def _write_sentencepiece(
  writer: gguf.GGUFWriter, tokenizer: SentencePieceTokenizer, vocab: int
) -> None:
  model: Any = protocol.ModelProto.FromString(tokenizer.model)  # type: ignore[attr]
  trainer, normalizer = model.trainer_spec, model.normalizer_spec
  if trainer.model_type != trainer.BPE:
    raise InputError(
      "tokenizer.model: GGUF holds SentencePiece's BPE, and this is another kind. "
      "Train with data.tokenizer.kind=bpe."
    )
  if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
    raise InputError(
      f"tokenizer.model: GGUF cannot say the normalization {normalizer.name!r}."
    )
  control = {index: text for text, index in tokenizer.specials.items()}
  tokens, scores, kinds = [], [], []
  for index in range(vocab):
    known = index < len(model.pieces)
    piece = model.pieces[index] if known else None
    tokens.append(control.get(index, piece.piece if piece else f"[PAD{index}]"))
    scores.append(piece.score if piece else 0.0)
    kind = piece.type if piece else int(Kind.UNUSED)
    kinds.append(int(Kind.CONTROL) if index in control else kind)
  writer.add_tokenizer_model("llama")
  writer.add_tokenizer_pre("default")
  writer.add_token_list(tokens)
  writer.add_token_scores(scores)
  writer.add_token_types(kinds)
  writer.add_unk_token_id(trainer.unk_id)
