"""Every feature that a model can have, and how to take it away.

A parity test proves only what it would fail without. So each entry of `FEATURES` makes
of a model the one without the feature, or the same where the model has none.
"""

import dataclasses
from dataclasses import replace

import jax.numpy as jnp

from jaxlm.models.spec import (
  LM,
  ALiBi,
  Block,
  LayerNorm,
  LongScaling,
  RMSNorm,
  RoPE,
)
from jaxlm.trees import map_named

# Fields that are sizes: with another value the parameters would not fit.
SIZES = {"vocab", "dim", "repeats", "heads", "kv_heads", "head_dim", "hidden"}
# Values that say that there is nothing to take away.
OFF = (None, "none", 0.0, 1.0, "head")
# Not seen by a forward pass, or (of LongScaling) only in another golden.
UNSEEN = {"context", "Learned.length", "LongScaling.short", "LongScaling.length"}
UNSEEN |= {"LongScaling.original_length"}


def arranged(model: LM, blocks: tuple[Block, ...]) -> LM:
  """Returns the model with these blocks, each on its own."""
  return replace(model, prefix=blocks[:-1], pattern=blocks[-1:], repeats=1)


def flat(model: LM) -> LM:
  """Returns the same model with no two blocks that share a scan."""
  return arranged(model, model.blocks)


def blocks(change):
  return lambda model: arranged(model, tuple(map(change, model.blocks)))


def mixers(change):
  return blocks(lambda block: replace(block, mixer=change(block.mixer)))


def mlps(change):
  return blocks(lambda block: replace(block, mlp=change(block.mlp)))


def ropes(change, near=(True, False)):
  """Changes rotary positions in the blocks with a window or without, or in both."""

  def changed(mixer):
    turns = isinstance(mixer.positions, RoPE) and (mixer.window is not None) in near
    return replace(mixer, positions=change(mixer.positions)) if turns else mixer

  return mixers(changed)


def scalings(change):
  """Changes rotary scaling where there is one."""
  return ropes(lambda r: r if r.scaling is None else replace(r, scaling=change(r)))


def scaled(field, change):
  """Changes one field of any rotary scaling that has it."""

  def changed(rope):
    scaling = rope.scaling
    if field not in vars(scaling) or f"{type(scaling).__name__}.{field}" in UNSEEN:
      return scaling
    return replace(scaling, **{field: change(vars(scaling)[field])})

  return scalings(changed)


def norms(change):
  """Changes the norms of blocks."""
  return blocks(lambda block: replace(block, norm=change(block.norm)))


def other_eps(norm):
  """Takes an epsilon away, or adds one where it is too small to be seen."""
  return norm and replace(norm, eps=1e-6 if norm.eps > 1e-4 else 1e-3)


def qk_norms(change):
  return mixers(
    lambda m: m if m.qk_norm is None else replace(m, qk_norm=change(m.qk_norm))
  )


def other_norm(norm):
  if isinstance(norm, RMSNorm):
    return LayerNorm(eps=norm.eps, bias=False)
  return RMSNorm(eps=norm.eps)


def without_offset(norm):
  return replace(norm, offset=0.0) if isinstance(norm, RMSNorm) else norm


def without_bias(norm):
  return replace(norm, bias=False) if isinstance(norm, LayerNorm) else norm


def every_norm(change):
  """Changes all norms but those of queries and keys."""

  def changed(model):
    inner = norms(change)(model)
    embed = None if model.embed_norm is None else change(model.embed_norm)
    return replace(inner, embed_norm=embed, final_norm=change(model.final_norm))

  return changed


def placed(known, other):
  return blocks(
    lambda block: replace(block, placement=other) if block.placement == known else block
  )


def whole(rope):
  """Lets all dims turn; further pairs are not scaled."""
  if rope.fraction == 1:
    return rope
  scaling = rope.scaling
  if isinstance(scaling, LongScaling):
    pairs = round(len(scaling.long) / rope.fraction)
    ones = (1.0,) * (pairs - len(scaling.long))
    scaling = replace(scaling, short=scaling.short + ones, long=scaling.long + ones)
  return replace(rope, fraction=1.0, scaling=scaling)


def without_slopes(mixer):
  slopes = isinstance(mixer.positions, ALiBi)
  return replace(mixer, positions=None) if slopes else mixer


def rolled_mixers(model):
  mixers = [block.mixer for block in model.blocks]
  pairs = zip(model.blocks, mixers[1:] + mixers[:1], strict=True)
  return arranged(model, tuple(replace(b, mixer=m) for b, m in pairs))


def near_like_far(model):
  far = [b.mixer.positions for b in model.blocks if b.mixer.window is None]
  return ropes(lambda rope: far[0], near=(True,))(model) if far else model


FEATURES = {
  "window": mixers(lambda m: replace(m, window=None)),
  "window, by one": mixers(lambda m: replace(m, window=m.window and m.window + 1)),
  "which blocks have the window": rolled_mixers,
  "slopes": mixers(without_slopes),
  "learned positions": lambda model: replace(model, positions=None),
  "rope base": ropes(lambda r: replace(r, base=10 * r.base), near=(False,)),
  "rope base, near": ropes(lambda r: replace(r, base=10 * r.base), near=(True,)),
  "rope of its own, near": near_like_far,
  "rope fraction": ropes(whole),
  "rope scaling": scalings(lambda rope: None),
  "rope factor": scaled("factor", lambda factor: 2 * factor),
  "rope original length": scaled("original_length", lambda length: 2 * length),
  "rope low frequency": scaled("low_frequency", lambda turns: turns / 2),
  "rope high frequency": scaled("high_frequency", lambda turns: 2 * turns),
  "rope beta fast": scaled("beta_fast", lambda turns: 8 * turns),
  "rope beta slow": scaled("beta_slow", lambda turns: 8 * turns),
  "rope magnitude": scaled("magnitude", lambda magnitude: 1.0),
  "rope factors": scaled("long", lambda factors: tuple(2 * f for f in factors)),
  "scale": mixers(lambda m: replace(m, scale=None)),
  "softcap": mixers(lambda m: replace(m, softcap=None)),
  "final softcap": lambda model: replace(model, softcap=None),
  "qk_norm": mixers(lambda m: replace(m, qk_norm=None)),
  "qk_norm's span": mixers(
    lambda m: replace(
      m,
      qk_norm_span={"head": "heads", "heads": "head"}[m.qk_norm_span]
      if m.qk_norm
      else "head",
    )
  ),
  "qk_norm's eps": qk_norms(other_eps),
  "qk_norm's offset": qk_norms(without_offset),
  "eps": norms(other_eps),
  "final eps": lambda model: replace(model, final_norm=other_eps(model.final_norm)),
  "embedding's eps": lambda model: replace(
    model, embed_norm=other_eps(model.embed_norm)
  ),
  "norm offset": every_norm(without_offset),
  "norm biases": every_norm(without_bias),
  "kind of norm": every_norm(other_norm),
  "norms before": placed("sandwich", "output"),
  "norms behind": placed("sandwich", "pre"),
  "norms in their place": placed("pre", "output"),
  "norms in their place, behind": placed("output", "pre"),
  "embedding's norm": lambda model: replace(model, embed_norm=None),
  "embedding's scale": lambda model: replace(model, embed_scale=1.0),
  "attention's biases": mixers(lambda m: replace(m, bias="none")),
  "output's bias": mixers(
    lambda m: replace(m, bias="qkv") if m.bias == "all" else m
  ),
  "MLP's biases": mlps(lambda mlp: replace(mlp, bias="none")),
  "activation": mlps(lambda mlp: replace(mlp, activation="relu")),
  "gelu's tanh form": mlps(
    lambda mlp: replace(mlp, activation="gelu")
    if mlp.activation == "gelu_tanh"
    else mlp
  ),
  "tied head": lambda model: replace(
    model, head={"tied": "untied", "untied": "tied"}[model.head]
  ),
}  # fmt: skip


def supplied(model: LM, params):
  """Returns parameters for the models above too: flat, with more leaves than needed.

  A norm that stood elsewhere is found there, a head that was tied is another matrix,
  and scales of queries and keys get the width that the model wants.
  """
  last = {"0": _supplied(model.blocks[-1], params["layers"]["0"])}
  own = {
    f"prefix_{i}": _supplied(block, params[f"prefix_{i}"])
    for i, block in enumerate(model.prefix)
  }
  other_head = jnp.roll(params["embed"]["table"], 1, 0).T
  return {"head": other_head} | params | own | {"layers": last}


def _supplied(block: Block, leaves):
  mixer, moved = block.mixer, {}
  for name, leaf in leaves.items():
    if name.endswith("_norm"):
      moved |= {f"{name.split('_')[0]}_{place}_norm": leaf for place in ("pre", "post")}

  def fit(name, leaf):
    if "q_norm" not in name and "k_norm" not in name:
      return leaf
    heads = mixer.heads if "q_norm" in name else mixer.kv_heads
    width = mixer.head_dim * (heads if mixer.qk_norm_span == "heads" else 1)
    return jnp.resize(leaf, (*leaf.shape[:-1], width))

  return map_named(fit, moved | leaves)


def to_be_taken(spec, at=""):
  """Yields the path of every field that makes a difference, below a spec."""
  kind = type(spec).__name__
  for field in dataclasses.fields(spec):
    value, path = vars(spec)[field.name], f"{at}{field.name}"
    if {field.name, f"{kind}.{field.name}"} & (SIZES | UNSEEN):
      continue
    if isinstance(value, tuple) and dataclasses.is_dataclass(value[0] if value else 0):
      for index, one in enumerate(value):
        yield from to_be_taken(one, f"{path}.{index}.")
    elif dataclasses.is_dataclass(value):
      yield from list(to_be_taken(value, f"{path}.")) or [path]
    elif value not in OFF and value != ():
      yield path
