"""How much of a chip's memory a training step needs, told without compiling it.

Parameters, optimizer state and gradients are exact: their shapes and shardings are
known. Activations and temporaries are a model of what is alive at the fullest moment:
in the loss, in the backward pass of a block, or in that of the embedding.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.models import count, spec
from jaxlm.models.attention import work_of
from jaxlm.models.decoder import Decoder
from jaxlm.ops.attention import QUERIES
from jaxlm.ops.collectives import PIECE
from jaxlm.ops.kernels.choice import NAMING, Chosen, choose
from jaxlm.shapes import PyTree
from jaxlm.training.objective import BASE, Frozen
from jaxlm.training.state import HOST, Plan
from jaxlm.trees import named_leaves

LANES = 128
"""Width of a TPU's vector unit: its attention kernel writes each log-partition so often
and pads the dim of a head to it."""


class Memory(NamedTuple):
  """Bytes of one device, by what they hold."""

  parameters: float
  optimizer: float
  gradients: float
  frozen: float
  """Parameters that the step reads and does not train."""
  temporaries: float
  """Activations kept for the backward pass, and what a computation needs at a time."""

  @property
  def total(self) -> float:
    """All of them."""
    return sum(self)


class Work(NamedTuple):
  """What a device computes on at a time."""

  rows: float
  """Rows of a micro-batch on a device."""
  length: float
  """Positions of a row on a device."""
  chunk: int
  """Positions of each row that have logits at a time."""


def held_bytes(shapes: PyTree, shardings: PyTree) -> float:
  """Returns how many bytes of a tree one device holds, those on its host apart."""
  placed = named_leaves(shardings)
  return sum(
    math.prod(placed[name].shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for name, leaf in named_leaves(shapes).items()
    if placed[name].memory_kind != HOST
  )


def predict(
  decoder: Decoder, plan: Plan, work: Work, frozen: tuple[Frozen, ...] = ()
) -> Memory:
  """Returns the memory of a device in a training step.

  Activations of frozen parameters are left out.
  """
  shapes, shardings = plan.shapes, plan.shardings
  parameters = held_bytes(shapes.params, shardings.params)
  state = held_bytes(shapes, shardings)
  in_float32 = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), shapes.params
  )
  gradients = held_bytes(in_float32, shardings.params)
  beside_it = any(part.name == BASE for part in frozen)
  # The loss comes before there is a gradient of a layer, the embedding after them all.
  loss = _loss(decoder, work, frozen=beside_it)
  fullest = max(loss - gradients, _backward(decoder, work))
  temporaries = kept(decoder, work) + fullest
  if not beside_it:
    temporaries = max(temporaries, _embedding(decoder))
  kept_beside = [part.shapes for part in frozen]
  shardings = jax.tree.map(lambda leaf: leaf.sharding, kept_beside)
  beside = held_bytes(kept_beside, shardings)
  return Memory(parameters, state - parameters, gradients, beside, temporaries)


def _split(decoder: Decoder, axis: str) -> int:
  return decoder.layout.size(axis)


def kept(decoder: Decoder, work: Work) -> float:
  """Returns the bytes kept of every block from the forward to the backward pass."""
  dtype, blocks = count.BYTES[decoder.precision.compute], decoder.spec.blocks
  tokens = work.rows * work.length
  keep = spec.kept(decoder.remat)
  stream = decoder.spec.dim / _split(decoder, "residual")
  stream *= _split(decoder, "sequence") / _split(decoder, "stream")
  if keep is not None and keep.input == "offload":
    stream = 0.0
  inside = {block: _kept_inside(decoder, block, work) for block in set(blocks)}
  return sum(stream + inside[block] for block in blocks) * tokens * dtype


def _chosen(decoder: Decoder, mixer: spec.GQA, work: Work) -> Chosen:
  asked = work_of(mixer, int(work.length), decoder.precision.compute)
  return choose(decoder.attention, asked, decoder.layout)


def _kept_inside(decoder: Decoder, block: spec.Block, work: Work) -> float:
  """Returns what a device keeps of a token beside a block's input."""
  keep, mixer, dim = spec.kept(decoder.remat), block.mixer, decoder.spec.dim
  head = _padded_head(decoder, mixer)
  keys = mixer.kv_heads * head / _split(decoder, "kv_heads")
  queries = mixer.heads * head / _split(decoder, "heads")
  sizes = {"query": queries, "key": keys, "value": keys, "attention": queries}
  sizes["out"] = dim
  hidden = 0.0
  if block.mlp is not None:
    hidden = block.mlp.hidden / _split(decoder, "mlp")
    names = ("gate", "up") if isinstance(block.mlp, spec.GLU) else ("up",)
    sizes |= dict.fromkeys(names, hidden)
    if block.placement != "pre":  # a norm has it as input
      sizes["down"] = dim
  if keep is None:  # the input of each product as well
    return sum(sizes.values()) + 2 * dim + hidden
  if _chosen(decoder, mixer, work).kernel not in NAMING:
    del sizes["attention"]
  return sum(size for name, size in sizes.items() if name in keep.named("save"))


def _mixer_features(decoder: Decoder, block: spec.Block) -> float:
  """Returns queries, keys, values and outputs of a token."""
  mixer = block.mixer
  queries = 2 * mixer.heads / _split(decoder, "heads")
  keys = 2 * mixer.kv_heads / _split(decoder, "kv_heads")
  return (queries + keys) * _padded_head(decoder, mixer)


def _padded_head(decoder: Decoder, mixer: spec.GQA) -> int:
  """Returns the dim of a head as it lies in memory; a TPU's kernel wants lanes full."""
  if decoder.layout.mesh.devices.flat[0].platform != "tpu":
    return mixer.head_dim
  return mixer.head_dim + -mixer.head_dim % LANES


def _backward(decoder: Decoder, work: Work) -> float:
  """Returns the bytes alive in the backward pass of the largest block."""
  return max(_block(decoder, block, work) for block in set(decoder.spec.blocks))


def _block(decoder: Decoder, block: spec.Block, work: Work) -> float:
  dtype = count.BYTES[decoder.precision.compute]
  dim, tokens = decoder.spec.dim, work.rows * work.length
  # The stream, its gradient, and one of a norm.
  features = 3.0 * dim + _mixer_features(decoder, block)
  largest = dim * block.mixer.heads * block.mixer.head_dim / _split(decoder, "heads")
  if block.mlp is not None:
    hidden = block.mlp.hidden / _split(decoder, "mlp")
    # Gate and up, and the gradients of both.
    features += (4 if isinstance(block.mlp, spec.GLU) else 2) * hidden
    largest = max(largest, dim * hidden)
  # Of the largest matrix the next one gathered, and two gradients on their way.
  weights = largest * (dtype + 2 * 4) if _split(decoder, "embed") > 1 else 4 * largest
  return features * tokens * dtype + _scores(decoder, block, work) + weights


def _scores(decoder: Decoder, block: spec.Block, work: Work) -> float:
  """Returns the bytes of attention's own, beside what it takes and gives."""
  heads = block.mixer.heads / _split(decoder, "heads")
  length = int(work.length)
  match _chosen(decoder, block.mixer, work).kernel:
    case "splash":  # a row at a time
      return 4.0 * LANES * length * heads
    case "cudnn":  # the mask, and as numbers
      return 3.0 * work.rows * length * length
    case "blocks":  # scores, their exponentials, and the gradient of one
      return 3 * 4.0 * work.rows * heads * min(QUERIES, length) * length
    case "reference":
      return 3 * 4.0 * work.rows * heads * length * length


def _embedding(decoder: Decoder) -> float:
  """Returns the bytes of the table's gradient, before and after its sum."""
  return 2 * 4 * decoder.spec.vocab / _split(decoder, "vocab") * decoder.spec.dim


def _loss(decoder: Decoder, work: Work, *, frozen: bool) -> float:
  """Returns the bytes alive while the loss walks over its chunks.

  A frozen head has no gradient.
  """
  dtype = count.BYTES[decoder.precision.compute]
  vocab, dim = decoder.spec.vocab / _split(decoder, "vocab"), decoder.spec.dim
  tokens = work.rows * min(work.chunk, work.length)
  logits = 2 * 4 * tokens * vocab
  # The head gathered, its gradient, and a piece of that while it is being scattered.
  head = dim * vocab * dtype
  if not frozen:
    head += 4 * dim * (vocab + min(vocab, PIECE))
  return logits + head + 3 * work.rows * work.length * dim * dtype
