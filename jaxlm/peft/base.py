"""The frozen model beside which something smaller trains."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxlm.errors import InputError
from jaxlm.models import decoder as decoders
from jaxlm.models.decoder import Decoder
from jaxlm.peft import methods, quantized
from jaxlm.peft.soft_prompt import Prefix, Prompt, PTuning
from jaxlm.peft.targets import Tuning
from jaxlm.quantization.formats import Format
from jaxlm.shapes import PyTree
from jaxlm.sharding.rules import Layout, check_divides


class Base(NamedTuple):
  """What trains of a model, and the frozen rest."""

  tuning: Tuning
  shapes: PyTree
  """Of the whole model, each with its sharding."""
  trained: PyTree
  """Of what trains, each with its sharding."""
  frozen: PyTree
  """Of what stays beside it, each with its sharding."""
  freeze: Callable[[PyTree], PyTree]
  """Makes it of the whole model's parameters, whose buffers it takes."""
  attached: Callable[[PyTree, PyTree], PyTree]
  """Makes of the frozen and of what trains what a decoder takes; compiled once."""
  prefix: int
  """Virtual tokens that every token sees."""


def base_of(
  spec: methods.Adapters,
  also: tuple[str, ...],
  form: Format | None,
  decoder: Decoder,
) -> Base:
  """Returns what trains by a method, beside a base that is kept in a format.

  `also` names parameters that train whole.

  Raises:
    InputError: the adapters or the format do not suit the model or the mesh.
  """
  layout, tuning = decoder.layout, methods.build(spec, also, decoder)
  boxed = jax.eval_shape(lambda key: decoders.init(decoder, key), jax.random.key(0))
  shapes, axes = decoders.unbox(boxed), decoders.axes_of(boxed)

  whole = _shardings(layout, axes)
  trained = jax.eval_shape(tuning.init, shapes, jax.random.key(0))
  kept, shardings = shapes, whole
  if form is not None:
    kept = jax.eval_shape(lambda p: quantized.quantized(form, decoder, p), shapes)
    shardings = quantized.shardings(decoder, kept, whole)
    try:
      check_divides(layout, kept, shardings)
    except InputError as error:
      raise InputError(f"quantized: {form} on this mesh: {error}") from error

  def freeze(params: PyTree) -> PyTree:
    if tuning.prepare is not None:
      prepare = jax.jit(tuning.prepare, out_shardings=whole, donate_argnums=0)
      params = prepare(params)
    return params if form is None else quantized.convert(form, decoder, params)

  return Base(
    tuning,
    _placed(shapes, whole),
    _placed(trained, _shardings(layout, tuning.axes)),
    _placed(kept, shardings),
    freeze,
    jax.jit(lambda base, trained: tuning.attach(base, trained, None)),
    spec.length if isinstance(spec, Prefix | Prompt | PTuning) else 0,
  )


def _shardings(layout: Layout, axes: PyTree) -> PyTree:
  is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
  return jax.tree.map(lambda names: layout.sharding(*names), axes, is_leaf=is_axes)


def _placed(shapes: PyTree, shardings: PyTree) -> PyTree:
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    shapes,
    shardings,
  )
