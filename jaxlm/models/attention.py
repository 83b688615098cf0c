"""Grouped-query attention over a sequence, or over a cache of earlier keys.

Where the parameters have `prefix_k` and `prefix_v` [S, G, K], these are keys and values
at positions 0 to S - 1 that every row and every segment sees (Li & Liang 2021).
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.errors import InputError
from jaxlm.models import spec as specs
from jaxlm.models.cached import KVCache, Seen, extend
from jaxlm.models.norms import Norm
from jaxlm.models.parameters import bias, given, matrix
from jaxlm.models.positions import rope_frequencies
from jaxlm.ops.attention import Prefix, Scoring, attend_heads
from jaxlm.ops.kernels.choice import Kernel, Work, attend_sequences
from jaxlm.ops.masks import attention_mask
from jaxlm.ops.rope import alibi_slopes, rotate
from jaxlm.ops.weights import einsum
from jaxlm.shapes import Array, Float, Int
from jaxlm.sharding.rules import Layout


class Attention(nn.Module):
  """GQA by its spec."""

  spec: specs.GQA
  precision: specs.Precision
  layout: Layout
  depth: int
  kernel: Kernel = "auto"

  @nn.compact
  def __call__(
    self,
    x_BTD: Float[Array, "B T D"],
    positions_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"] | None,
    cache: KVCache | None,
  ) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Returns the update to the residual stream and the cache with these keys.

    Positions begin behind the prefix, where there is one.
    """
    D, H, G, K = (
      x_BTD.shape[-1],
      self.spec.heads,
      self.spec.kv_heads,
      self.spec.head_dim,
    )
    q_BTHK = self._heads("q", x_BTD, (D, H, K), ("embed", "heads", "head_dim"))
    k_BTGK = self._heads("k", x_BTD, (D, G, K), ("embed", "kv_heads", "head_dim"))
    v_BTGK = self._heads("v", x_BTD, (D, G, K), ("embed", "kv_heads", "head_dim"))
    if self.spec.qk_norm is not None:
      q_BTHK = self._qk_norm("q_norm", self.spec.qk_norm, q_BTHK)
      k_BTGK = self._qk_norm("k_norm", self.spec.qk_norm, k_BTGK)
    if isinstance(self.spec.positions, specs.RoPE):
      frequencies, magnitude = rope_frequencies(self.spec.positions, K)
      q_BTHK = rotate(q_BTHK, positions_BT, frequencies, magnitude=magnitude)
      k_BTGK = rotate(k_BTGK, positions_BT, frequencies, magnitude=magnitude)
    qkv, prefix = (q_BTHK, k_BTGK, v_BTGK), self._prefix()
    if cache is None:
      out_BTHK = self._attend(qkv, positions_BT, segments_BT, prefix)
    else:
      if segments_BT is not None:
        raise InputError("segments: a cache holds one document a row; give none.")
      out_BTHK, cache = self._read(qkv, positions_BT, cache, prefix)
    out_BTHK = self.layout.constrain(out_BTHK, "batch", "sequence", "heads", "head_dim")
    return self._output(out_BTHK, D), cache

  def _heads(
    self, name: str, x: Array, shape: tuple[int, ...], axes: tuple[str, ...]
  ) -> Array:
    weight = matrix(self, name, shape, axes, dtype=self.precision.params)
    y = einsum("BTD,DHK->BTHK", x, weight)
    if self.spec.bias != "none":
      y += bias(self, f"{name}_bias", shape[1:], self.precision.params).astype(y.dtype)[
        None, None
      ]
    y = checkpoint_name(y, {"q": "query", "k": "key", "v": "value"}[name])
    return self.layout.constrain(y, "batch", "sequence", axes[1], "head_dim")

  def _qk_norm(self, name: str, norm: specs.Norm, x_BTHK: Array) -> Array:
    apply = Norm(norm, self.precision, name=name)
    if self.spec.qk_norm_span == "head":
      return apply(x_BTHK)
    B, T, H, K = x_BTHK.shape
    return apply(x_BTHK.reshape(B, T, H * K)).reshape(B, T, H, K)

  def _output(self, out_BTHK: Array, dim: int) -> Array:
    shape = (*out_BTHK.shape[2:], dim)
    axes = ("heads", "head_dim", "embed")
    dtype = self.precision.params
    scale = (2 * self.depth) ** -0.5
    weight = matrix(self, "o", shape, axes, dtype=dtype, inputs=2, scale=scale)
    y = einsum("BTHK,HKD->BTD", out_BTHK, weight)
    if self.spec.bias == "all":
      y += bias(self, "o_bias", (dim,), dtype).astype(y.dtype)[None, None]
    return checkpoint_name(y, "out")

  def _prefix(self) -> Prefix | None:
    axes = (None, "kv_heads", "head_dim")
    k_SGK, v_SGK = (given(self, f"prefix_{name}", *axes) for name in "kv")
    if k_SGK is None or v_SGK is None:
      return None
    return Prefix(k_SGK, v_SGK)

  def _attend(
    self,
    qkv: tuple[Array, Array, Array],
    positions_BT: Array,
    segments_BT: Array | None,
    prefix: Prefix | None,
  ) -> Array:
    whole = jnp.zeros_like(positions_BT) if segments_BT is None else segments_BT
    # A first pass that makes parameters sees one token, which no fused kernel takes.
    kernel = "blocks" if self.is_initializing() else self.kernel
    length, dtype = positions_BT.shape[1], str(qkv[0].dtype)
    work = work_of(self.spec, length, dtype, 0 if prefix is None else prefix.length)
    return attend_sequences(
      kernel, work, self.layout, qkv, (positions_BT, whole), prefix
    )

  def _read(
    self,
    qkv: tuple[Array, Array, Array],
    positions_BT: Array,
    cache: KVCache,
    prefix: Prefix | None,
  ) -> tuple[Array, KVCache]:
    q_BTHK, k_BTGK, v_BTGK = qkv
    window = self.spec.window
    # The cache holds none of the prefix, and counts positions without it.
    ahead = 0 if prefix is None else prefix.length
    cache, seen = extend(cache, k_BTGK, v_BTGK, positions_BT - ahead, window)
    if prefix is not None:
      seen = _behind(prefix, seen)
    mask_BTS = attention_mask(positions_BT, seen.positions_BS, window=window)
    distance_BTS = positions_BT[:, :, None] - seen.positions_BS[:, None]
    scoring, keys = scoring_of(self.spec), (seen.k_BGKS, seen.v_BGSK)
    return attend_heads(scoring, q_BTHK, *keys, mask_BTS, distance_BTS), cache


def _behind(prefix: Prefix, seen: Seen) -> Seen:
  """Returns what is seen with a prefix in front."""
  B = len(seen.positions_BS)
  k_BSGK, v_BSGK = prefix.rows(B, seen.k_BGKS.dtype)
  ahead = Seen(
    jnp.transpose(k_BSGK, (0, 2, 3, 1)), jnp.swapaxes(v_BSGK, 1, 2), prefix.positions(B)
  )
  own = seen._replace(positions_BS=seen.positions_BS + prefix.length)
  parts = zip(ahead, own, (3, 2, 1), strict=True)
  return Seen(*(jnp.concatenate((a, b), axis) for a, b, axis in parts))


def scoring_of(spec: specs.GQA) -> Scoring:
  """Returns how queries and keys make scores."""
  slopes = None
  if isinstance(spec.positions, specs.ALiBi):
    slopes = tuple(alibi_slopes(spec.heads).tolist())
  scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
  return Scoring(scale, spec.softcap, slopes, spec.window)


def work_of(spec: specs.GQA, length: int, dtype: str, prefix: int = 0) -> Work:
  """Returns what attention over sequences of a length has to do."""
  scoring, heads = scoring_of(spec), (spec.heads, spec.kv_heads, spec.head_dim)
  return Work(scoring, *heads, length, dtype, prefix)
