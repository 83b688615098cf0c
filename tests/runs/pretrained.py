"""A tiny pretrained model with a tokenizer that chats, in a Hugging Face folder."""

import json

import numpy as np
from etils import epath
from models.specs import decoder, params_of
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxlm.data import tokenizers
from jaxlm.interop.checkpoint import Exported
from jaxlm.models.families.llama import build
from jaxlm.models.families.shape import Shape
from jaxlm.models.spec import RoPE

BEGIN, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
  "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MODEL = build(
  Shape(
    vocab=304, dim=32, layers=2, heads=4, kv_heads=2, hidden=48, rope=RoPE(),
    tied=True, context=128,
  )
)  # fmt: skip


def write_tokenizer(folder):
  made = Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=300, initial_alphabet=alphabet, show_progress=False,
    special_tokens=[AddedToken(token, special=True) for token in (BEGIN, END)],
  )  # fmt: skip
  made.train_from_iterator(["the king is here and there\n"] * 9, trainer)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "tokenizer.json").write_text(made.to_str())
  (folder / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": TEMPLATE,
      }
    )
  )


def write(folder, model=MODEL):
  """Writes the folder; returns the parameters."""
  made = folder.with_name(f"{folder.name}-tokenizer")
  write_tokenizer(made)
  tokenizer = tokenizers.read(epath.Path(made), model.vocab, "model")
  params = params_of(decoder(model))
  exported = Exported(model, None, params, tokenizer)
  exported.write(epath.Path(folder), "hf", "float32", lambda n: None)
  return params


def equal(one, other):
  return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
