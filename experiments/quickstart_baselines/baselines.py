"""What a compressor and an n-gram model reach on quickstart's held-out text.

    uv run python experiments/quickstart_baselines/baselines.py

Both see the documents that quickstart trains on, and are charged for the documents that
it is evaluated on, in bits per byte of their text. The n-gram model is an interpolated
Kneser-Ney model over bytes (Kneser & Ney 1995; Chen & Goodman 1999), a discount of
n1 / (n1 + 2 n2) for each order; it predicts the end of each document too, as the
language model does.
"""

import argparse
import lzma
import math
import time

import numpy as np

from jaxlm import config
from jaxlm.data.examples import documents

BEGIN, END, SYMBOLS = 256, 257, 258
BITS = 9


def split_texts(path: str) -> tuple[list[bytes], list[bytes]]:
  """Returns the training and the held-out documents of a config."""
  halves: dict[str, list[bytes]] = {"train": [], "held_out": []}
  for _, half, document in documents(config.load(path).data):
    halves[half].append(document.content.encode())
  return halves["train"], halves["held_out"]


def xz_bits_per_byte(train: list[bytes], held_out: list[bytes]) -> float:
  """Returns the growth of `xz -9`'s output when the held-out text follows."""

  def size(texts: list[bytes]) -> int:
    return len(lzma.compress(b"".join(texts), preset=9))

  grown = size(train + held_out) - size(train)
  return 8 * grown / len(b"".join(held_out))


def grams(texts: list[bytes], order: int) -> np.ndarray:
  """Returns each position's n-gram as one integer, its last symbol lowest."""
  parts = []
  for text in texts:
    symbols = np.full(len(text) + order, BEGIN, np.uint64)
    symbols[order - 1 : -1] = np.frombuffer(text, np.uint8)
    symbols[-1] = END
    keys = np.zeros(len(text) + 1, np.uint64)
    for i in range(order):
      keys = (keys << np.uint64(BITS)) | symbols[i : i + len(keys)]
    parts.append(keys)
  return np.concatenate(parts)


class Level:
  """Counts of one order: by n-gram, and by its context."""

  def __init__(self, keys: np.ndarray, counts: np.ndarray):
    self.keys, self.counts = keys, counts
    contexts, first = np.unique(keys >> np.uint64(BITS), return_index=True)
    self.contexts = contexts
    self.totals = np.add.reduceat(counts, first)
    self.kinds = np.diff(np.append(first, len(keys)))
    ones, twos = np.sum(counts == 1), np.sum(counts == 2)
    self.discount = ones / (ones + 2 * twos)

  def mix(self, grams: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Returns this order's probabilities, given those of the order below."""
    count = lookup(self.keys, self.counts, grams)
    context = grams >> np.uint64(BITS)
    total = lookup(self.contexts, self.totals, context)
    kinds = lookup(self.contexts, self.kinds, context)
    safe = np.maximum(total, 1)
    kept = np.maximum(count - self.discount, 0) / safe
    return np.where(total > 0, kept + self.discount * kinds / safe * below, below)


def lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  """Returns the value at each wanted key, 0 where it is absent."""
  place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  return np.where(keys[place] == wanted, values[place], 0)


def kneser_ney_bits_per_byte(
  train: list[bytes], held_out: list[bytes], order: int
) -> float:
  """Returns the code length of the held-out documents under an n-gram model."""
  keys, counts = np.unique(grams(train, order), return_counts=True)
  levels = [Level(keys, counts)]
  for n in range(order - 1, 0, -1):
    mask = np.uint64((1 << (BITS * n)) - 1)
    keys, counts = np.unique(keys & mask, return_counts=True)
    levels.append(Level(keys, counts))
  test = grams(held_out, order)
  probability = np.full(len(test), 1 / (SYMBOLS - 1))
  for n, level in enumerate(reversed(levels), 1):
    mask = np.uint64((1 << (BITS * n)) - 1)
    probability = level.mix(test & mask, probability)
  return -float(np.sum(np.log2(probability))) / sum(map(len, held_out))


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--config", default="configs/quickstart.py")
  train, held_out = split_texts(parser.parse_args().config)
  print(
    f"training: {len(train)} documents, {sum(map(len, train)):,} bytes; held out: "
    f"{len(held_out)} documents, {sum(map(len, held_out)):,} bytes"
  )
  rows = [("xz -9", lambda: xz_bits_per_byte(train, held_out))]
  for order in (3, 4, 5, 6, 7):
    rows.append(
      (
        f"Kneser-Ney, {order}-gram of bytes",
        lambda order=order: kneser_ney_bits_per_byte(train, held_out, order),
      )
    )
  for name, run in rows:
    began = time.perf_counter()
    bits = run()
    assert math.isfinite(bits)
    print(f"{name:28} {bits:.4f} bits per byte  ({time.perf_counter() - began:.1f} s)")


if __name__ == "__main__":
  main()
