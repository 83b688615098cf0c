"""A chat in the terminal with a model, through its own template."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Literal

from jaxlm import files
from jaxlm.data.chat import Message, encode_chat
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.sampling import Sampling
from jaxlm.decoding.session import Session
from jaxlm.errors import InputError
from jaxlm.runs.loaded import Pretrained

HELP = "An empty line or Ctrl-D ends the chat, /reset begins a new one."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
  """Talks with a model in the terminal."""

  model: str
  """A Hugging Face folder, a .gguf file, a folder of configs/convert.py, a workdir."""
  system: str | None = None
  """What the model is told first; None: what its template says by itself."""
  template: str | None = None
  """A file with a Jinja chat template; None: the model's own."""
  sampling: Sampling = dataclasses.field(
    default_factory=lambda: Sampling(temperature=0.7, top_p=0.95)
  )
  """How tokens are chosen."""
  tokens: int = 512
  """Most new tokens of a reply."""
  length: int = 2048
  """Tokens that the chat may have, replies included."""
  compute: Literal["float32", "bfloat16"] | None = None
  """Dtype of the computation; None: float32 on a CPU, bfloat16 elsewhere."""
  seed: int = 0
  """Of the draws."""
  tensor: int = 1
  """Devices over which heads, hidden units and vocabulary are split."""

  def __post_init__(self):
    for field in ("tokens", "length", "tensor"):
      if vars(self)[field] < 1:
        raise InputError(f"{field}: {vars(self)[field]} is under 1.")
    if self.seed < 0:
      raise InputError(f"seed: {self.seed} is negative.")

  def run(self) -> None:
    """Reads lines and writes replies until the input ends.

    Raises:
      InputError: the model cannot be loaded, or has no chat template.
    """
    chat = self._open()
    print(HELP)
    for line in _lines():
      if line == "/reset":
        chat = dataclasses.replace(chat, messages=self._first())
        continue
      chat = self._reply(chat, line)

  def _open(self) -> "_Chat":
    loaded = Pretrained(path=self.model, compute=self.compute, tensor=self.tensor).load(
      self.length, "one"
    )
    template = loaded.tokenizer.chat_template
    if self.template is not None:
      template = files.read_text(files.find(self.template, "template")[0])
    if template is None:
      raise InputError(
        f"model: {self.model} has no chat template. Give one with "
        "--config.template=FILE, or a model that was tuned to chat."
      )
    session = Session(loaded.decoder, loaded.params, length=loaded.length)
    return _Chat(session, loaded.tokenizer, template, self._first())

  def _first(self) -> tuple[Message, ...]:
    if self.system is None:
      return ()
    return (Message(role="system", content=self.system),)

  def _reply(self, chat: "_Chat", line: str) -> "_Chat":
    """Prints the reply to a line; returns the chat with both, or as it was."""
    messages = (*chat.messages, Message(role="user", content=line))
    ids = encode_chat(chat.tokenizer, messages, template=chat.template)
    if len(ids) >= chat.session.length:
      print(
        f"[{len(ids)} tokens do not fit into {chat.session.length}: /reset begins "
        "anew, --config.length= gives more room]"
      )
      return chat
    began = time.perf_counter()
    stream = chat.session.stream(
      ids, self.sampling, stops=chat.tokenizer.stops, seed=self.seed + len(messages)
    )
    made: list[int] = []
    shown = ""
    with contextlib.suppress(KeyboardInterrupt):
      for token in stream:
        made.append(token)
        shown += _show(chat.tokenizer, made, shown)
        if len(made) == self.tokens:
          print(" [cut: --config.tokens= allows more]", end="")
          break
      else:
        if len(ids) + len(made) >= chat.session.length:
          print(" [cut: --config.length= gives more room]", end="")
    speed = len(made) / (time.perf_counter() - began)
    print(f"\n[{len(made)} tokens, {speed:.1f} a second]" if sys.stdin.isatty() else "")
    reply = Message(role="assistant", content=chat.tokenizer.decode(made))
    return dataclasses.replace(chat, messages=(*messages, reply))


@dataclasses.dataclass(frozen=True)
class _Chat:
  """What stays from line to line."""

  session: Session
  tokenizer: Tokenizer
  template: str
  messages: tuple[Message, ...]


def _show(tokenizer: Tokenizer, made: list[int], shown: str) -> str:
  """Prints and returns what a new token adds; half a letter waits for the rest."""
  text = tokenizer.decode(made)
  whole = text.rstrip("\ufffd") if len(text) - len(shown) < 4 else text
  new = whole[len(shown) :]
  print(new, end="", flush=True)
  return new


def _lines() -> Iterator[str]:
  while True:
    try:
      line = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
      print()
      return
    if not line:
      return
    yield line
