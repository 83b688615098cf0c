"""A model's matrices in few bits, each array of them where its matrix is."""

from collections.abc import Callable
from typing import Any

import jax

from jaxlm.models.decoder import Decoder
from jaxlm.ops.quantized import CodedScales, Quantized
from jaxlm.peft.targets import Targets, copied, get, put, targets_of
from jaxlm.quantization.formats import Format, quantize
from jaxlm.shapes import Array, PyTree

MATRICES = ("all-linear",)
"""Which matrices are quantized: those of the layers; tables and the head stay."""


def quantized(spec: Format, decoder: Decoder, params: PyTree) -> PyTree:
  """Returns parameters with a `Quantized` leaf at each matrix of a layer.

  Raises:
    InputError: the format does not suit a matrix.
  """
  targets, params = targets_of(MATRICES, decoder), copied(params)
  for name in targets.matrices:
    put(params, name, _rounded(spec, targets, name)(get(params, name)))
  return params


def convert(spec: Format, decoder: Decoder, params: PyTree) -> PyTree:
  """Does as `quantized` to arrays; each matrix's buffer ends with its turn."""
  targets, params = targets_of(MATRICES, decoder), copied(params)
  for name in targets.matrices:
    weight, fn = get(params, name), _rounded(spec, targets, name)
    placed = _leaf(decoder, jax.eval_shape(fn, weight), targets, name)
    put(params, name, jax.jit(fn, out_shardings=placed)(weight))
    weight.delete()
  return params


def _rounded(spec: Format, targets: Targets, name: str) -> Callable[[Array], Quantized]:
  inputs, stacked = targets.matrices[name].inputs, targets.stacked(name)
  return lambda weight: quantize(spec, weight, inputs=inputs, stacked=stacked)


def shardings(decoder: Decoder, shapes: PyTree, whole: PyTree) -> PyTree:
  """Returns the shardings of `quantized` parameters.

  Args:
    decoder: on its layout.
    shapes: of the quantized parameters.
    whole: shardings of the parameters before that.
  """
  targets, placed = targets_of(MATRICES, decoder), copied(whole)
  for name in targets.matrices:
    put(placed, name, _leaf(decoder, get(shapes, name), targets, name))
  return placed


def _leaf(decoder: Decoder, leaf: Quantized, targets: Targets, name: str) -> Quantized:
  layers, ins, outs = targets.axes(name)
  axes = (*layers, *ins, outs[0])

  def sharding(array: Any) -> Any:
    # Scales have 1 where many numbers share them.
    sizes = zip(array.shape, leaf.codes.shape, axes, strict=True)
    return decoder.layout.sharding(
      *(None if size == 1 < whole else axis for size, whole, axis in sizes)
    )

  scales: Any = leaf.scales
  if isinstance(scales, CodedScales):
    scales = CodedScales(
      sharding(scales.codes),
      decoder.layout.sharding(*layers, None),
      decoder.layout.sharding(*layers),
    )
  else:
    scales = sharding(scales)
  return jax.tree.unflatten(
    jax.tree.structure(leaf), jax.tree.leaves((sharding(leaf.codes), scales))
  )
