"""Small tokenizers of each kind, as the library `tokenizers` trains and saves them."""

import json

from tokenizers import (
  AddedToken,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  trainers,
)

CONTROL = ["<unk>", "<|begin|>", "<|end|>", "<|turn|>"]
BYTE_NAMES = [f"<0x{value:02X}>" for value in range(256)]


def byte_level(texts, **options):
  """Returns a byte-level BPE with four control tokens and an added word."""
  made = Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | options)
  made.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  made.train_from_iterator(
    texts,
    trainers.BpeTrainer(
      vocab_size=500,
      special_tokens=CONTROL,
      initial_alphabet=sorted(alphabet),
      show_progress=False,
    ),
  )
  words = ["<call>", "<\u00e9>"]
  made.add_tokens([AddedToken(word, normalized=False) for word in words])
  made.add_special_tokens([AddedToken("<|late|>", normalized=False, rstrip=True)])
  return made


def metaspace(texts, scheme):
  """Returns a BPE that writes spaces as U+2581 and falls back to bytes."""
  made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
  made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
  made.decoder = decoders.Sequence(
    [
      decoders.Replace("\u2581", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 0 if scheme == "never" else 1, 0),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=600, special_tokens=CONTROL + BYTE_NAMES, show_progress=False
  )
  made.train_from_iterator(texts, trainer)
  data = json.loads(made.to_str())
  data["added_tokens"] = [t for t in data["added_tokens"] if t["id"] < len(CONTROL)]
  made = Tokenizer.from_str(json.dumps(data))
  made.add_tokens([AddedToken("<call>", normalized=False)])
  return made


def legacy(texts):
  """Returns what older conversions of SentencePiece look like."""
  made = metaspace(texts, "never")
  made.pre_tokenizer = None
  made.normalizer = normalizers.Sequence(
    [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
  )
  data = json.loads(made.to_str())
  data["pre_tokenizer"] = None
  return Tokenizer.from_str(json.dumps(data))


def unigram(texts):
  """Returns a Unigram whose own vocabulary holds the control tokens' texts."""
  made = Tokenizer(models.Unigram())
  made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
  made.decoder = decoders.Metaspace(prepend_scheme="first")
  trainer = trainers.UnigramTrainer(
    vocab_size=400,
    special_tokens=CONTROL,
    unk_token="<unk>",
    initial_alphabet=[chr(c) for c in range(32, 127)],
    show_progress=False,
  )
  made.train_from_iterator(texts, trainer)
  return made


MAKERS = {
  "bytes": byte_level,
  "bytes, space": lambda texts: byte_level(texts, add_prefix_space=True),
  "first": lambda texts: metaspace(texts, "first"),
  "always": lambda texts: metaspace(texts, "always"),
  "never": lambda texts: metaspace(texts, "never"),
  "legacy": legacy,
}
NAMED = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


def write(folder, made, **settings):
  """Writes a tokenizer.json and the other files of a folder, by their first word."""
  folder.mkdir(exist_ok=True)
  if made is not None:
    made.save(str(folder / "tokenizer.json"))
  for name, value in ({"tokenizer_config": NAMED} | settings).items():
    if value is not None:
      (folder / f"{name}.json").write_text(json.dumps(value))
  return folder
