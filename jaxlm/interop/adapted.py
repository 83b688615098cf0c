"""A model out of a run that trained adapters: its base, read again, and they."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import xxhash
from etils import epath

from jaxlm import files
from jaxlm.errors import InputError
from jaxlm.interop import own
from jaxlm.models.decoder import Decoder, logits
from jaxlm.peft.base import Base, base_of
from jaxlm.peft.methods import Adapters
from jaxlm.peft.targets import merge
from jaxlm.shapes import Array, PyTree
from jaxlm.training import checkpoints

PROBE = 64
"""Tokens of a row on which a merged model is compared with its adapters."""


class Adapted:
  """The adapters of a run, beside the weights that it started from."""

  def __init__(self, place: epath.Path, run: Any):
    """`place` is a checkpoint's folder and `run` its config."""
    self.place, self.run = place, run
    self.told = json.loads((place / "data.json").read_text())

  @property
  def initial(self) -> epath.Path:
    """Where the run's first weights are: as its config says, or as it found them."""
    given = files.path(self.run.initial)
    return given if given.exists() else epath.Path(self.told["initial"])

  @property
  def identity(self) -> str:
    """A hash of the checkpoint, and by it of its base."""
    manifest = self.place / checkpoints.MANIFEST
    return xxhash.xxh3_128(manifest.read_bytes()).hexdigest()

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

  def merged(self, decoder: Decoder, weights: PyTree, identity: str) -> PyTree:
    """Returns arrays alone, in the decoder's dtype.

    Args:
      decoder: of the model.
      weights: those that the run started from, in its dtype; their buffers are taken.
      identity: of them.

    Raises:
      InputError: they are not those.
    """
    run, known = self.run, self.told["base"]
    if identity != known:
      raise InputError(
        f"{self.place}: its adapters were trained beside the weights {known}, and "
        f"those of initial={run.initial} are {identity}. Bring the first ones back."
      )
    base, trained = self.base(decoder), self.trained(decoder)
    attached = base.attached(base.freeze(weights), trained)

    def together(attached: PyTree) -> PyTree:
      params = merge(attached)
      return jax.tree.map(lambda x: x.astype(decoder.precision.params), params)

    params = jax.jit(together)(attached)
    if run.quantized is not None:
      apart, largest = _logits_apart(decoder, attached, params)
      print(
        f"{self.place}: merged into the weights as {run.quantized} has them, in "
        f"{decoder.precision.params}; on drawn tokens the largest difference of a "
        f"logit is {apart:.2g}, of {largest:.3g}"
      )
    return params


def _logits_apart(decoder: Decoder, one: PyTree, other: PyTree) -> tuple[float, float]:
  """Returns the largest difference of logits, and the largest logit."""
  layout, model = decoder.layout, decoder.spec
  rows, length = layout.size("batch"), PROBE // layout.size("sequence")
  shape = (rows, min(length, model.context or length) * layout.size("sequence"))
  ids_BT = jax.random.randint(jax.random.key(0), shape, 0, model.vocab)
  ids_BT = jax.device_put(ids_BT, layout.sharding("batch", "sequence"))

  @jax.jit
  def outputs(params: PyTree, ids_BT: Array) -> Array:
    x_BTD, _ = decoder.apply({"params": params}, ids_BT)
    return x_BTD if model.scores is not None else logits(model, params, x_BTD)

  found, wanted = outputs(other, ids_BT), outputs(one, ids_BT)
  return float(jnp.abs(found - wanted).max()), float(jnp.abs(wanted).max())


def adapted_of(folder: epath.Path) -> Adapted | None:
  """Returns the adapters of a run's newest whole checkpoint, where it trained some."""
  if (folder / own.MODEL).exists():
    return None
  run = own.run_of(folder)
  return None if run.adapters is None else Adapted(own.place_of(folder), run)
