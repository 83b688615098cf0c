"""Prompts of a file to a file of texts, a batch at a time."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from typing import Any, Literal

import tqdm
from etils import epath

from jaxlm import config, files
from jaxlm.data.chat import Message, encode_chat
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.compiles import compiles
from jaxlm.decoding.constraints import (
  JsonSchema,
  Regex,
  Vocabulary,
  compile_constraint,
)
from jaxlm.decoding.generate import Generation, Options
from jaxlm.decoding.sampling import Sampling
from jaxlm.decoding.texts import Ends, Written, write
from jaxlm.errors import InputError
from jaxlm.runs.loaded import Loaded, Pretrained

FREE = ("batch", "chunk")
"""Fields that may change between two calls that write one file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
  """Writes what follows each prompt of a file."""

  model: Pretrained
  """The model."""
  prompts: str
  """A .jsonl file, or .txt with a prompt a line; also .gz and .zst. A jsonl row has
  "prompt" (text that goes on; an empty one begins a document), or "messages" (role,
  content; through the model's chat template)."""
  out: str
  """The .jsonl file to write: a row for each prompt and sample, in order. Rows that
  it has already are not made again."""
  sampling: Sampling = dataclasses.field(default_factory=Sampling)
  """How tokens are chosen."""
  samples: int = 1
  """Texts for each prompt, each drawn from a seed of its own."""
  tokens: int = 256
  """Most new tokens of a text."""
  stop: tuple[str, ...] = ()
  """A text ends before the first of these, beside the model's own stop tokens."""
  constraint: Regex | JsonSchema | None = None
  """What each whole text must be; needs the extra constrain."""
  top: int = 0
  """How many of the likeliest tokens to write at each place."""
  chats: bool = False
  """Whether each row of the file also has `messages`, the prompt's and the answer, for
  configs/sft.py to learn from, cut answers included; then all prompts must be
  messages."""
  batch: int = 8
  """Rows at a time."""
  chunk: int = 512
  """Prompt tokens read at a time."""
  cache: Literal["float32", "bfloat16", "int8"] | None = None
  """Dtype of keys and values; None: that of the computation."""
  length: int = 4096
  """Tokens that prompt and text may have together, if the model can."""
  seed: int = 0
  """Of all draws: row r of the file draws from a stream of (seed, r)."""

  def __post_init__(self):
    for field in ("samples", "tokens", "batch", "chunk", "length"):
      if vars(self)[field] < 1:
        raise InputError(f"{field}: {vars(self)[field]} is under 1.")
    if self.samples > 1 and self.sampling.temperature == 0:
      raise InputError("samples: greedy texts of a prompt are all the same; give 1.")
    if self.samples > 1 and self.sampling.seed is not None:
      raise InputError("sampling.seed: all samples would be the same; give `seed`.")
    if not 0 <= self.seed < 2**31:
      raise InputError(f"seed: {self.seed} is not from 0 to 2**31 - 1.")

  def run(self) -> list[dict[str, Any]]:
    """Writes the file; returns its rows.

    Raises:
      InputError: a prompt that cannot be read or is too long, or a file that another
        run wrote.
    """
    given = list(self._given())
    for where, row in given:
      if self.chats and "messages" not in row:
        raise InputError(f"{where}: chats is true, and the prompt is no 'messages'.")
    loaded = self.model.load(self.length, "one" if self.batch == 1 else "many")
    ids = [self._encode(loaded, where, row) for where, row in given]
    ends = self._ends(loaded.tokenizer)
    out, made = self._claim(given)
    began, tokens = time.perf_counter(), 0
    total = len(ids) * self.samples
    rows = [row for _, row in files.read_jsonl(out)] if made else []
    with compiles() as seen, tqdm.tqdm(total=total, initial=made) as bar:
      for first in range(made, total, self.batch):
        places = range(first, min(first + self.batch, total))
        texts = self._batch(
          loaded, [ids[i // self.samples] for i in places], places, ends
        )
        new = [
          json.dumps(self._row(i, given, text), ensure_ascii=False) + "\n"
          for i, text in zip(places, texts, strict=True)
        ]
        with out.open("a") as file:
          file.writelines(new)
        rows += map(json.loads, new)
        tokens += sum(len(text.row.tokens) for text in texts)
        bar.update(len(new))
    seconds = time.perf_counter() - began
    print(
      f"{out}: {total} texts, {total - made} of them new; {tokens} tokens in "
      f"{seconds:.1f} s, {len(seen.names)} programs compiled in {seen.seconds:.1f} s "
      "of these"
    )
    return rows

  def _given(self) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields where each prompt stands, and its row."""
    for file in files.find(self.prompts, "prompts"):
      if ".jsonl" not in file.name:
        lines = files.read_text(file).removesuffix("\n").split("\n")
        for number, line in enumerate(lines, 1):
          yield f"{file}, line {number}", {"prompt": line}
        continue
      for number, row in files.read_jsonl(file):
        where = f"{file}, line {number}"
        if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
          raise InputError(f"{where}: needs either 'prompt' or 'messages'.")
        if other := row.keys() - {"prompt", "messages", "id"}:
          raise InputError(
            f"{where}: {sorted(other)} would change nothing; a row has 'prompt' or "
            "'messages', and 'id', which is copied. The sampling is the config's."
          )
        yield where, row

  def _claim(self, given: list) -> tuple[epath.Path, int]:
    """Returns the file, and how many rows this run has written to it already."""
    total = len(given) * self.samples
    out = files.absolute(self.out)
    note = out.with_name(out.name + ".config.json")
    mine = dataclasses.replace(self, **{f: getattr(Generate, f) for f in FREE})
    prompts = json.dumps([row for _, row in given]).encode()
    text = f"{config.to_json(mine)}\nprompts {hashlib.sha256(prompts).hexdigest()}\n"
    if not out.exists():
      out.parent.mkdir(parents=True, exist_ok=True)
      files.write_atomic(note, text)
      files.write_atomic(out, "")
      return out, 0
    if not note.exists() or note.read_text() != text:
      raise InputError(
        f"out: {out} is there, and was not written by this config from these prompts. "
        "Give another file."
      )
    whole = files.read_text(out)
    kept = whole[: whole.rfind("\n") + 1]  # a killed run may leave half a row
    files.write_atomic(out, kept)
    made = kept.count("\n")
    print(f"going on: {out} has {made} of {total} texts")
    return out, made

  def _encode(self, loaded: Loaded, where: str, row: dict[str, Any]) -> list[int]:
    tokenizer = loaded.tokenizer
    if "messages" in row:
      if tokenizer.chat_template is None:
        raise InputError(f"{where}: 'messages', and the model has no chat template.")
      try:
        messages = tuple(Message(**message) for message in row["messages"])
        ids = encode_chat(tokenizer, messages, template=tokenizer.chat_template)
      except (TypeError, InputError) as error:
        raise InputError(f"{where}: messages: {error}") from error
    else:
      if not isinstance(row["prompt"], str):
        raise InputError(f"{where}: prompt: {row['prompt']!r} is no text.")
      ids = tokenizer.encode(row["prompt"])
      ids = [tokenizer.bos, *ids] if tokenizer.add_bos or not ids else ids
    room = loaded.length - len(ids)
    if room < self.tokens:
      raise InputError(
        f"{where}: {len(ids)} tokens leave room for {room} of {loaded.length}, and "
        f"tokens is {self.tokens}. Shorten the prompt, lower tokens or raise length."
      )
    return ids

  def _ends(self, tokenizer: Tokenizer) -> Ends:
    if self.constraint is None:
      return Ends(self.stop)
    return Ends(self.stop, compile_constraint(self.constraint, Vocabulary(tokenizer)))

  def _batch(
    self, loaded: Loaded, prompts: list[list[int]], places: range, ends: Ends
  ) -> list[Written]:
    samplings = [self._sampling(place) for place in places]
    options = Options(
      tokens=self.tokens,
      stops=loaded.tokenizer.stops,
      top=self.top,
      chunk=self.chunk,
      cache=self.cache,
    )
    decoder, params = loaded.decoder, loaded.params
    growing = Generation(decoder, params, prompts, samplings, options)
    return write(growing, loaded.tokenizer, ends)

  def _sampling(self, place: int) -> Sampling:
    if self.sampling.seed is not None:
      return self.sampling
    return dataclasses.replace(self.sampling, seed=self.seed * 2**32 + place)

  def _row(self, place: int, given: list, text: Written) -> dict[str, Any]:
    asked = given[place // self.samples][1]
    row = {name: asked[name] for name in ("id",) if name in asked} | {
      "prompt": place // self.samples,
      "sample": place % self.samples,
      "text": text.text,
      "ended": text.ended,
      "tokens": text.row.tokens,
      "logprobs": [round(value, 6) for value in text.row.model],
    }
    if self.chats:
      answer = {"role": "assistant", "content": text.text}
      row["messages"] = [*asked["messages"], answer]
    tops = {"top": text.row.top, "top_sampling": text.row.top_sampling}
    return row | (tops if self.top else {})
