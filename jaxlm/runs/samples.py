"""Text that a run writes at its end, to be looked at."""

import dataclasses

from jaxlm.data.chat import Message, encode_chat
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.generate import generate
from jaxlm.decoding.sampling import Sampling
from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder
from jaxlm.shapes import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
  """Text written at the end of a run."""

  prompts: tuple[str, ...] = ("",)
  """What the samples begin with; an empty one begins a document."""
  tokens: int = 128
  """New tokens of each."""
  sampling: Sampling = dataclasses.field(default_factory=Sampling)
  """How tokens are chosen."""
  chat: bool = False
  """Whether a prompt is a user's message, in the tokenizer's chat template."""

  def __post_init__(self):
    if self.tokens < 1:
      raise InputError(f"samples.tokens: {self.tokens} is under 1.")

  def ids(self, tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the prompts' ids."""
    if self.chat:
      return [
        encode_chat(tokenizer, [Message(role="user", content=prompt)])
        for prompt in self.prompts
      ]
    return [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in self.prompts]


def write_samples(
  samples: Samples, decoder: Decoder, params: PyTree, tokenizer: Tokenizer, seed: int
) -> str:
  """Prints what follows each prompt; returns what it printed."""
  prompts = samples.ids(tokenizer)
  new = generate(
    decoder,
    params,
    prompts,
    samples.sampling,
    tokens=samples.tokens,
    stops=tuple(tokenizer.stops),
    seed=seed,
  )
  # model.vocab may be rounded up: an id past the tokenizer's stands for no text.
  known = [[i for i in row.tokens if i < tokenizer.vocab] for row in new]
  texts = [
    tokenizer.decode([*prompt, *ids])
    for prompt, ids in zip(prompts, known, strict=True)
  ]
  told = "\n\n".join(f"--- sample {i} ---\n{t}" for i, t in enumerate(texts, 1))
  print(f"\n{told}")
  return told + "\n"
