"""What the engines share: the prompt, the lengths, one line of JSON a figure."""

import json
import pathlib

PREFILL, DECODE = 512, 128
GOLDEN = pathlib.Path(__file__).parents[2] / "tests" / "goldens" / "smollm2.json"


def ids_of(rows: int) -> list[list[int]]:
  """Returns different prompts of 512 ids, chunks of the perplexity text."""
  ids = json.loads(GOLDEN.read_text())["perplexity"]["token_ids"]
  return [ids[row * PREFILL : (row + 1) * PREFILL] for row in range(rows)]


def report(what: str, tokens: int, start, end, new=()) -> None:
  """Prints tokens per second, wall and of the process's CPU time."""
  wall, cpu = (b - a for a, b in zip(start, end, strict=True))
  row = {"what": what, "wall": tokens / wall, "cpu": tokens / cpu, "new": list(new)}
  print(json.dumps(row), flush=True)
