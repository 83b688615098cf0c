"""A model out of a run that trained adapters: its base, read again, and they."""

import json
from typing import Any

import jax
from etils import epath

from jaxlm.errors import InputError
from jaxlm.interop import own
from jaxlm.models.decoder import Decoder
from jaxlm.peft.base import Base, base_of
from jaxlm.peft.methods import Adapters
from jaxlm.peft.targets import merge
from jaxlm.shapes import PyTree
from jaxlm.training import checkpoints
from jaxlm.training.fingerprint import weights_hash


class Adapted:
  """The adapters of a run, beside the weights that it started from."""

  def __init__(self, place: epath.Path, run: Any):
    """`place` is a checkpoint's folder and `run` its config."""
    self.place, self.run = place, run

  def base(self, decoder: Decoder) -> Base:
    """Returns what trained, and beside what."""
    run = self.run
    return base_of(run.adapters, run.also, run.quantized, decoder)

  def trained(self, decoder: Decoder) -> PyTree:
    """Returns the adapters; their average where the run kept one."""
    shapes, averaged = self.base(decoder).trained, self.run.ema is not None
    checkpoints.check_same_model(self.place, shapes)
    if averaged:
      print(f"{self.place}: the average of the adapters is used, as in its evaluations")
    return own.restore_arrays(self.place, shapes, averaged=averaged)

  def plain(self, decoder: Decoder) -> tuple[Adapters, PyTree]:
    """Returns a spec and adapters beside the weights that the run started from.

    Raises:
      InputError: the run changed those weights at its start, or trained others whole.
    """
    spec = self.run.adapters
    if self.run.also:
      raise InputError(f"{self.place}: also={self.run.also} trained whole; merge it.")
    if self.base(decoder).tuning.prepare is not None:
      raise InputError(
        f"{self.place}: these adapters are for weights that {spec} changed at the "
        "start. Export the merged model instead."
      )
    return spec, self.trained(decoder)

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
    base, trained = self.base(decoder), self.trained(decoder)
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
