"""Parameters, FLOPs and cache bytes from a spec alone; no JAX, no arrays."""

from typing import NamedTuple

from jaxlm.models import spec

BYTES = {"float32": 4, "bfloat16": 2}


class Parameters(NamedTuple):
  """Parameter counts by group."""

  embedding: int
  mixers: int
  mlps: int
  norms: int
  head: int

  @property
  def total(self) -> int:
    """All of them."""
    return sum(self)


class Flops(NamedTuple):
  """Floating-point operations of one token, a multiply and an add counted as two.

  `causal` counts the keys that a query sees; `full` counts every key of the sequence
  (or of the window), as published tables before 2025 mostly do.
  """

  causal: float
  full: float


def parameters(model: spec.LM) -> Parameters:
  """Returns the counts of a model."""
  embedding = model.vocab * model.dim
  if isinstance(model.positions, spec.Learned):
    embedding += model.positions.length * model.dim
  blocks = model.blocks
  return Parameters(
    embedding=embedding,
    mixers=sum(_mixer(block.mixer, model.dim) for block in blocks),
    mlps=sum(_mlp(block.mlp, model.dim) for block in blocks),
    norms=sum(_norms(block, model.dim) for block in blocks)
    + _norm(model.final_norm, model.dim)
    + _norm(model.embed_norm, model.dim),
    head=_head(model),
  )


def _head(model: spec.LM) -> int:
  if model.scores is not None:
    return model.scores * model.dim
  return model.vocab * model.dim if model.head == "untied" else 0


def _norm(norm: spec.Norm | None, dim: int) -> int:
  if norm is None:
    return 0
  return 2 * dim if isinstance(norm, spec.LayerNorm) and norm.bias else dim


def _norms(block: spec.Block, dim: int) -> int:
  each = 2 if block.placement == "sandwich" else 1
  places = each * (1 if block.mlp is None else 2)
  mixer = block.mixer
  heads = mixer.heads + mixer.kv_heads if mixer.qk_norm_span == "heads" else 2
  return places * _norm(block.norm, dim) + heads * _norm(mixer.qk_norm, mixer.head_dim)


def _mixer(mixer: spec.Mixer, dim: int) -> int:
  q, kv = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
  biases = {"none": 0, "qkv": q + 2 * kv, "all": q + 2 * kv + dim}[mixer.bias]
  return dim * (2 * q + 2 * kv) + biases


def _mlp(mlp: spec.GLU | spec.MLP | None, dim: int) -> int:
  if mlp is None:
    return 0
  wide = 2 if isinstance(mlp, spec.GLU) else 1
  biases = wide * mlp.hidden + dim if mlp.bias == "all" else 0
  return (wide + 1) * dim * mlp.hidden + biases


def matrix_parameters(model: spec.LM) -> int:
  """Returns the parameters that every token is multiplied with, the head among them."""
  total = model.vocab * model.dim
  for block in model.blocks:
    mixer = block.mixer
    total += 2 * model.dim * mixer.head_dim * (mixer.heads + mixer.kv_heads)
    if block.mlp is not None:
      wide = 3 if isinstance(block.mlp, spec.GLU) else 2
      total += wide * model.dim * block.mlp.hidden
  return total


def keys_seen(seq_len: int, window: int | None) -> Flops:
  """Returns the mean number of keys of a query in a sequence, both ways of counting."""
  wide = seq_len if window is None else min(window, seq_len)
  seen = wide * (wide + 1) / 2 + (seq_len - wide) * wide
  return Flops(causal=seen / seq_len, full=wide)


def forward_flops(model: spec.LM, seq_len: int) -> Flops:
  """Returns the operations of a token's forward pass: matrices, scores and values."""
  causal = full = 2.0 * matrix_parameters(model)
  for block in model.blocks:
    a_key = 4.0 * block.mixer.heads * block.mixer.head_dim
    keys = keys_seen(seq_len, block.mixer.window)
    causal += a_key * keys.causal
    full += a_key * keys.full
  return Flops(causal, full)


def training_flops(model: spec.LM, seq_len: int, *, frozen: bool = False) -> Flops:
  """Returns the operations of a token's training step: three forward passes.

  They are two where the model is frozen: its weights have no gradients, and adapters'
  own operations are left out.
  """
  forward, passes = forward_flops(model, seq_len), 2 if frozen else 3
  return Flops(passes * forward.causal, passes * forward.full)


def cache_bytes(model: spec.LM, length: int, dtype: str) -> int:
  """Returns the bytes of one row's keys and values for `length` positions."""
  total = 0
  for mixer in (block.mixer for block in model.blocks):
    slots = min(mixer.window or length, length)
    total += 2 * mixer.kv_heads * mixer.head_dim * slots
  return total * BYTES[dtype]
