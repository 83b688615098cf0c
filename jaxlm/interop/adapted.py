"""A model out of a run that trained adapters: its base, read again, and they."""

import json
from typing import Any

import jax
from etils import epath

from jaxlm.errors import InputError
from jaxlm.interop import own
from jaxlm.models.decoder import Decoder
from jaxlm.peft.base import base_of
from jaxlm.peft.targets import merge
from jaxlm.shapes import PyTree
from jaxlm.training import checkpoints
from jaxlm.training.fingerprint import weights_hash


class Adapted:
  """The adapters of a run, beside the weights that it started from."""

  def __init__(self, place: epath.Path, run: Any):
    """`place` is a checkpoint's folder and `run` its config."""
    self.place, self.run = place, run

  def merged(self, decoder: Decoder, weights: PyTree) -> PyTree:
    """Returns arrays alone, in the decoder's dtype.

    Args:
      decoder: of the model.
      weights: those that the run started from, in its dtype; their buffers are taken.

    Raises:
      InputError: they are not those.
    """
    run = self.run
    found = weights_hash(decoder.layout, weights)
    known = json.loads((self.place / "data.json").read_text())["base"]
    if found != known:
      raise InputError(
        f"{self.place}: its adapters were trained beside the weights {known}, and "
        f"those of initial={run.initial} are {found}. Bring the first ones back."
      )
    base = base_of(run.adapters, run.also, run.quantized, decoder)
    checkpoints.check_same_model(self.place, base.trained)
    averaged = run.ema is not None
    if averaged:
      print(f"{self.place}: the average of the adapters is used, as in its evaluations")
    trained = own.restore_arrays(self.place, base.trained, averaged=averaged)
    if run.quantized is not None:
      print(f"{self.place}: merged into the weights as {run.quantized} has them")

    def together(frozen: PyTree, trained: PyTree) -> PyTree:
      params = merge(base.tuning.attach(frozen, trained, None))
      return jax.tree.map(lambda x: x.astype(decoder.precision.params), params)

    return jax.jit(together)(base.freeze(weights), trained)


def adapted_of(folder: epath.Path) -> Adapted | None:
  """Returns the adapters of a run's newest whole checkpoint, where it trained some."""
  if (folder / own.MODEL).exists():
    return None
  run = own.run_of(folder)
  return None if run.adapters is None else Adapted(own.place_of(folder), run)
