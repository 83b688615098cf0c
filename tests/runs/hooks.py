"""What the tests hook into a run; as a program, the command line with these hooks.

python hooks.py record=FILE [kill=STEP | hold=STEP | term=STEP] [process=I] --
  --config=... --workdir=...

Of several processes `process` alone does what is asked; FILE is process 0's.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
import warnings
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxlm.posttrain import objectives
from jaxlm.runs import train
from jaxlm.training import checkpoints
from jaxlm.training.objective import next_token
from jaxlm.trees import named_leaves


def noisy(spec, decoder):
  """The next-token objective, weighted by a draw, so that the rng matters."""
  objective = next_token(spec, decoder)

  def weighted(params, batch, rng):
    terms = objective(params, batch, rng)
    weight = 1 + 0.1 * jax.random.normal(rng)
    return terms._replace(numerator=weight * terms.numerator)

  return weighted


def address(batch):
  """A hash of a batch."""
  state = hashlib.sha256()
  for name in sorted(batch):
    parts = [shard.data for shard in batch[name].addressable_shards]
    whole = [batch[name]] if batch[name].is_fully_addressable else parts
    state.update(name.encode() + b"".join(np.asarray(part).tobytes() for part in whole))
  return state.hexdigest()


def leaves_of(checkpoint):
  """{"params/..." or "rest/...": array} of a checkpoint, not read by jaxlm itself."""
  reader, leaves = ocp.PyTreeCheckpointer(), {}
  for item in ("params", "rest"):
    with warnings.catch_warnings():
      warnings.filterwarnings("ignore", "Sharding info not provided")
      place = checkpoint / "arrays" / item
      as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
        reader.metadata(place).item_metadata.tree,
      )
      tree = reader.restore(place, restore_args=as_numpy)
    for name, leaf in named_leaves(tree).items():
      if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
      leaves[f"{item}/{name}"] = np.asarray(leaf)
  return leaves


@contextlib.contextmanager
def hooked(record, kill=None, hold=None, term=None, process=0):
  """Draws in the objective, and a line (step, hash of its batch) a step in a file.

  `kill`: the process kills itself when this step starts, once the checkpoint before it
  is whole. `hold`: the commit of this step's checkpoint says "holding" and waits.
  `term`: the process sends itself SIGTERM when this step starts.
  """

  class Recorded:
    """A compiled step that says what it was given."""

    def __init__(self, compiled):
      self.memory_analysis = compiled.memory_analysis
      self.compiled = compiled

    def __call__(self, state, batch):
      number, me = int(state.step), jax.process_index()
      if me == 0:
        with open(record, "a") as file:
          file.write(json.dumps([number, address(batch)]) + "\n")
      if number == term and me == process:
        os.kill(os.getpid(), signal.SIGTERM)
      if number == kill and me == process:
        while not stores[0].steps():
          time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
      return self.compiled(state, batch)

  def make_store(*args, **options):
    stores.append(store_class(*args, **options))
    return stores[-1]

  def hashes(folder):
    if hold is not None and folder.name == f"{hold:08d}":
      # One write: a print shares its buffer with the reports of the main thread.
      os.write(1, b"\nholding\n")
      time.sleep(600)
    return all_hashes(folder)

  stores = []
  compiled, store_class = train.compiled, train.Store
  all_hashes = checkpoints._hashes
  with (
    mock.patch.object(objectives, "make_next_token", noisy),
    mock.patch.object(train, "compiled", lambda *args: Recorded(compiled(*args))),
    mock.patch.object(train, "Store", make_store),
    mock.patch.object(checkpoints, "_hashes", hashes),
  ):
    yield


if __name__ == "__main__":
  from jaxlm.__main__ import main

  at = sys.argv.index("--")
  options = dict(word.split("=", 1) for word in sys.argv[1:at])
  sys.argv[1:] = sys.argv[at + 1 :]
  steps = {
    name: int(options[name])
    for name in ("kill", "hold", "term", "process")
    if name in options
  }
  with hooked(options["record"], **steps):
    main()
