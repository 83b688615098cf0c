"""The other layout of a model: every layer's weights an array of its own.

Training scans over stacked layers, so that compile time does not grow with depth. A
decoding step reads each weight once, and slicing it out of a stack is a copy: on a CPU
half of the time. And a scan holds the stack of the layers' caches twice. The unrolled
model is another spec of the same Decoder, whose blocks all stand in the prefix but for
the last pattern.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.models import spec
from jaxlm.models.decoder import Decoder, head_weight
from jaxlm.ops.weights import Blocked
from jaxlm.shapes import PyTree
from jaxlm.training.state import axes_of
from jaxlm.trees import map_named, named_leaves

MATRICES = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1, "head": 1}
"""Names of the matrices that a step multiplies with, and how many dims it sums over."""


def unrolled_spec(model: spec.LM) -> spec.LM:
  """Returns the spec whose scan runs over one pattern, with a head of its own.

  A tied head would be read against the order of its rows; a copy is not.
  """
  prefix = model.blocks[: -len(model.pattern)]
  return dataclasses.replace(model, prefix=prefix, repeats=1, head="untied")


def unroll(
  decoder: Decoder, params: PyTree, rows: Literal["one", "many"] = "many"
) -> tuple[Decoder, PyTree]:
  """Returns a decoder and parameters that give the same logits, faster by the token.

  Matrices are cast to the dtype of the computation, in which they are used anyway. The
  parameters that are given stay alive: for a while both copies do. For one row at a
  time on a CPU each float32 matrix is kept twice, see `Blocked`.
  """
  model, compute = decoder.spec, decoder.precision.compute

  def cast(name: str, leaf: jax.Array) -> Any:
    if leaf.ndim == 1:
      return leaf
    leaf = leaf.astype(compute)
    matrix = rows == "one" and name.rsplit("/")[-1] in MATRICES
    return Blocked.of(leaf, MATRICES[name.rsplit("/")[-1]]) if matrix else leaf

  def convert(params: PyTree) -> PyTree:
    new = {name: tree for name, tree in params.items() if name != "layers"}
    n, count = len(model.pattern), model.repeats * len(model.pattern)
    for i in range(count - n):
      layer = jax.tree.map(lambda a, at=i // n: a[at], params["layers"][str(i % n)])
      new[f"prefix_{len(model.prefix) + i}"] = layer
    new |= {"head": jnp.asarray(head_weight(model, params))}
    last = jax.tree.map(lambda a: a[-1], params["layers"])
    new, last = map_named(cast, new), map_named(cast, last)
    return new | {"layers": jax.tree.map(lambda a: a[None], last)}

  other = decoder.clone(spec=unrolled_spec(model), remat="none")
  over = None
  if decoder.layout.mesh.size > 1:
    is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    known = named_leaves(axes_of(other), is_axes)
    # What adapters put beside the model's own is small, and whole on each device.
    over = map_named(
      lambda name, _: decoder.layout.sharding(*known.get(name, ())),
      jax.eval_shape(convert, params),
    )
  return other, jax.jit(convert, out_shardings=over)(params)
