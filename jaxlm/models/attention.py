"""Grouped-query attention over a sequence, or over a cache of earlier keys."""

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.errors import InputError
from jaxlm.models import spec as specs
from jaxlm.models.cached import KVCache, Seen, extend
from jaxlm.models.norms import Norm
from jaxlm.models.parameters import bias, matrix
from jaxlm.models.positions import rope_frequencies
from jaxlm.ops.attention import Scoring, attend_heads
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
    """Returns the update to the residual stream and the cache with these keys."""
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
    if cache is None:
      whole = jnp.zeros_like(positions_BT) if segments_BT is None else segments_BT
      # A first pass that makes parameters sees one token, which no fused kernel takes.
      kernel = "blocks" if self.is_initializing() else self.kernel
      length, dtype = x_BTD.shape[1], str(q_BTHK.dtype)
      out_BTHK = attend_sequences(
        kernel,
        work_of(self.spec, length, dtype),
        self.layout,
        (q_BTHK, k_BTGK, v_BTGK),
        (positions_BT, whole),
      )
    else:
      if segments_BT is not None:
        raise InputError("segments: a cache holds one document a row; give none.")
      window = self.spec.window
      cache, seen = extend(cache, k_BTGK, v_BTGK, positions_BT, window)
      out_BTHK = self._read(q_BTHK, positions_BT, seen)
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

  def _read(self, q_BTHK: Array, positions_BT: Array, seen: Seen) -> Array:
    mask_BTS = attention_mask(positions_BT, seen.positions_BS, window=self.spec.window)
    distance_BTS = positions_BT[:, :, None] - seen.positions_BS[:, None]
    scoring, keys = scoring_of(self.spec), (seen.k_BGKS, seen.v_BGSK)
    return attend_heads(scoring, q_BTHK, *keys, mask_BTS, distance_BTS)


def scoring_of(spec: specs.GQA) -> Scoring:
  """Returns how queries and keys make scores."""
  slopes = None
  if isinstance(spec.positions, specs.ALiBi):
    slopes = tuple(alibi_slopes(spec.heads).tolist())
  scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
  return Scoring(scale, spec.softcap, slopes, spec.window)


def work_of(spec: specs.GQA, length: int, dtype: str) -> Work:
  """Returns what attention over sequences of a length has to do."""
  return Work(scoring_of(spec), spec.heads, spec.kv_heads, spec.head_dim, length, dtype)
