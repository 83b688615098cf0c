"""IA3: vectors that multiply what goes into or comes out of matrices.

tuning = ia3.tuning(IA3(), decoder)
params = tuning.attach(base, tuning.init(base, key), None)
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder
from jaxlm.ops.weights import Scaled
from jaxlm.peft.targets import Targets, Tuning, copied, get, put, targets_of
from jaxlm.shapes import Array, PyTree
from jaxlm.trees import named_leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3:
  """A trained factor for each output or input of some matrices (Liu et al. 2022).

  The defaults are PEFT's for Llama and Mistral; for Qwen and Gemma it has the outputs
  of queries and values, `targets=("/mixer/[qv]$",)`.
  """

  targets: tuple[str, ...] = (r"/mixer/[kv]$",)
  """Whose outputs are multiplied, bias included: names of presets, or regexes."""
  inputs: tuple[str, ...] = (r"/mlp/down$",)
  """Whose inputs are multiplied, likewise; none for ()."""

  def __post_init__(self):
    if not (self.targets or self.inputs):
      raise InputError("adapters.targets: nothing is chosen, and no inputs are.")


def tuning(spec: IA3, decoder: Decoder) -> Tuning:
  """Returns factors of a model: {.. name of a matrix: {outputs, inputs}} in float32.

  Each is there where it is chosen, and has the matrix's stacked dims and then those of
  its outputs or inputs. They start at one.

  Raises:
    InputError: a choice that names no matrix.
  """
  none = Targets({}, {})
  sides = {"outputs": none, "inputs": none}
  if spec.targets:
    sides["outputs"] = targets_of(spec.targets, decoder)
  if spec.inputs:
    sides["inputs"] = targets_of(spec.inputs, decoder, "adapters.inputs")

  def init(base: PyTree, key: Array) -> PyTree:
    del base, key
    out: dict[str, Any] = {}
    for side, targets in sides.items():
      for name in targets.matrices:
        layers, ins, outs = targets.parts(name)
        shape = (*layers, *(ins if side == "inputs" else outs))
        put(out, f"{name}/{side}", jnp.ones(shape))
    return out

  names = tuple(sides["outputs"].matrices | sides["inputs"].matrices)

  def attach(base: PyTree, adapters: PyTree, key: Array | None) -> PyTree:
    del key
    return _attached(names, base, adapters)

  axes: dict[str, Any] = {}
  for side, targets in sides.items():
    for name in targets.matrices:
      layers, ins, outs = targets.axes(name)
      put(axes, f"{name}/{side}", (*layers, *(ins if side == "inputs" else outs)))
  return Tuning(axes, init, attach)


def _attached(names: tuple[str, ...], base: PyTree, adapters: PyTree) -> PyTree:
  params, known = copied(base), named_leaves(base)
  for name in names:
    factors, bias = get(adapters, name), f"{name}_bias"
    put(params, name, Scaled(get(base, name), **factors))
    if "outputs" in factors and bias in known:
      product = known[bias].astype(jnp.float32) * factors["outputs"]
      put(params, bias, product.astype(known[bias].dtype))
  return params
