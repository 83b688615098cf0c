"""muP: its rules, what they leave alone, and the coordinate check over 16x of width."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import GLU, GQA, LM, Block, Precision
from jaxlm.scaling import transfer
from jaxlm.scaling.transfer import mup, standard
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout, ShardingRules
from jaxlm.training.optimizers import ALL, Adafactor, AdamW, Lion, Muon
from jaxlm.training.schedules import Constant
from jaxlm.training.state import axes_of, drawn
from jaxlm.trees import first_match, named_leaves

VOCAB = 32
WIDTHS = (32, 128, 512)
OPTIMIZERS = {
  "adamw": AdamW(lr=Constant(peak=3e-3)),
  "muon": Muon(lr=Constant(peak=1e-2)),
}


def model(width, *, head="tied", head_dim=16, layers=2, **fields):
  heads = width // head_dim
  block = Block(
    mixer=GQA(heads=heads, kv_heads=heads, head_dim=head_dim),
    mlp=GLU(hidden=2 * width),
    **fields,
  )
  return LM(vocab=VOCAB, dim=width, pattern=(block,), repeats=layers, head=head)


def layout():
  return Layout(make_mesh(Mesh(), jax.devices()[:1]), ShardingRules())


@pytest.fixture(scope="module")
def batches():
  """Text of a Markov chain, which a model learns something of in a few steps."""
  rng, rows, length = np.random.default_rng(0), 4, 16
  chain = rng.dirichlet(np.full(VOCAB, 0.05), VOCAB)

  def batch():
    text = np.zeros((rows, length + 1), np.int32)
    for i in range(length):
      text[:, i + 1] = [rng.choice(VOCAB, p=chain[token]) for token in text[:, i]]
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return {
      "tokens": jnp.asarray(text[:, :-1]),
      "targets": jnp.asarray(text[:, 1:]),
      "segments": jnp.ones((rows, length), jnp.int32),
      "positions": jnp.asarray(positions),
      "weights": jnp.ones((rows, length), jnp.float32),
    }

  return [batch() for _ in range(3)]


def checked(rules, optimizer, batches):
  spec = OPTIMIZERS[optimizer]
  if rules == "mup":
    base = model(WIDTHS[0])
    models = [mup(model(w), base, optimizer=type(spec), depth=None) for w in WIDTHS]
  else:
    models = [standard(model(w)) for w in WIDTHS]
  with jax.numpy_dtype_promotion("standard"):
    rows = transfer.coordinate_check(models, spec, batches, 0)
  return rows, transfer.growth(rows)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_coordinate_check_is_flat_under_mup(optimizer, batches):
  """Over 16 times the width."""
  rows, flat = checked("mup", optimizer, batches)
  assert flat.keys() == {
    "logits", "embed", "layers/0/mixer", "layers/0/mlp", "final_norm",
  }  # fmt: skip
  assert {row.width for row in rows} == set(WIDTHS)
  assert max(map(abs, flat.values())) < 0.2, flat


def test_without_the_rules_it_is_not(batches):
  _, steep = checked("none", "adamw", batches)
  assert steep["logits"] > 0.4, steep
  assert steep["layers/0/mixer"] > 0.4, steep


@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("kind", [AdamW, Muon, Lion], ids=lambda kind: kind.__name__)
def test_at_the_base_s_own_size_nothing_changes(kind, head):
  made = mup(model(32, head=head), model(32, head=head), optimizer=kind, depth=1.0)
  assert made.model == model(32, head=head)
  assert {(r.init, r.lr, r.decay) for r in made.rules} == {(1.0, 1.0, 1.0)}


NAMES = {
  "q": "layers/0/mixer/q",
  "o": "layers/0/mixer/o",
  "up": "layers/0/mlp/up",
  "down": "layers/0/mlp/down",
  "head": "head",
  "table": "embed/table",
  "norm": "layers/0/mlp_pre_norm/scale",
}


@pytest.mark.parametrize(
  ("kind", "matrices"), [(AdamW, 1 / 4), (Lion, 1 / 4), (Muon, 1 / 2)]
)
def test_the_rules_by_hand(kind, matrices):
  """Four times as wide: 1/n for updates of full size, 1/sqrt(n) for Muon's."""
  big, base = model(128, head="untied"), model(32, head="untied")
  made = mup(big, base, optimizer=kind, depth=None)
  spec = made.optimizer(kind(lr=Constant(peak=1.0), weight_decay=0.5))
  found = {
    short: tuple(
      first_match(rules, name) for rules in (made.init_scale, spec.lr_scale, spec.decay)
    )
    for short, name in NAMES.items()
  }
  one = (1.0, matrices, 1 / matrices)
  assert found == {
    "q": one, "o": one, "up": one, "down": one,
    "head": (2.0, 1.0, 1.0), "table": (1.0, 1.0, 1.0), "norm": (1.0, 1.0, 0.0),
  }  # fmt: skip
  assert made.model.logit_scale == 1 / 4
  assert "logits x 0.25" in made.describe()


def test_depth_by_hand():
  big, base = model(32, layers=8), model(32, layers=2)
  made = mup(big, base, optimizer=AdamW, depth=0.5)
  spec = made.optimizer(AdamW(lr=Constant(peak=1.0)))
  assert {b.residual_scale for b in made.model.blocks} == {0.5}
  # First values of branch outputs are those of the base, whose default shrinks them.
  assert first_match(made.init_scale, NAMES["down"]) == 2.0
  assert first_match(made.init_scale, NAMES["up"]) == 1.0
  assert first_match(spec.lr_scale, NAMES["up"]) == 0.5
  assert first_match(spec.lr_scale, NAMES["norm"]) == 0.5
  assert first_match(spec.lr_scale, NAMES["table"]) == 1.0
  full = mup(big, base, optimizer=AdamW, depth=1.0)
  assert {b.residual_scale for b in full.model.blocks} == {0.25}
  assert first_match(full.optimizer(spec_of()).lr_scale, NAMES["up"]) == 1.0


def spec_of():
  return AdamW(lr=Constant(peak=1.0))


def test_wider_heads_have_scores_over_their_width():
  big, base = model(64, head_dim=32), model(32, head_dim=16)
  mixer = mup(big, base, optimizer=AdamW, depth=None).model.pattern[0].mixer
  assert mixer.scale == pytest.approx(16**0.5 / 32)


def test_drawn_values_have_the_rules_deviations():
  """The head is drawn as wide as the base's, whatever its own inputs."""
  big, base = model(128, head="untied"), model(32, head="untied")
  made = mup(big, base, optimizer=AdamW, depth=None)
  found = {}
  for name, (spec, scale) in {
    "big": (made.model, made.init_scale), "base": (base, ALL), "plain": (big, ALL),
  }.items():  # fmt: skip
    decoder = Decoder(spec, Precision(), layout())
    first = jax.jit(lambda key, d=decoder, s=scale: drawn(d, key, s))
    found[name] = named_leaves(first(jax.random.key(0)))
  deviation = lambda name, leaf: float(jnp.std(found[name][leaf]))  # noqa: E731
  assert deviation("big", "head") == pytest.approx(deviation("base", "head"), rel=0.1)
  for leaf in found["plain"]:
    if leaf != "head":
      np.testing.assert_array_equal(found["big"][leaf], found["plain"][leaf])


def applied(spec, params, tokens):
  decoder = Decoder(spec, Precision(), layout())
  return jax.jit(lambda tokens: decoder.apply({"params": params}, tokens)[0])(tokens)


@pytest.mark.parametrize("placement", ["pre", "post", "output", "sandwich"])
def test_a_branch_scaled_by_zero_is_no_branch(placement, batches):
  """A token then says nothing to the next one."""
  plain = model(32, placement=placement)
  block = dataclasses.replace(plain.pattern[0], residual_scale=0.0)
  none = dataclasses.replace(plain, pattern=(block,))
  params = drawn(Decoder(plain, Precision(), layout()), jax.random.key(0), ALL)
  tokens = batches[0]["tokens"]
  other = tokens.at[:, 0].set((tokens[:, 0] + 1) % VOCAB)
  for spec, alike in ((plain, False), (none, True)):
    before, after = (applied(spec, params, t)[:, 1:] for t in (tokens, other))
    assert np.array_equal(before, after) == alike


def test_logits_are_linear_in_their_scale(batches):
  plain = model(32)
  half = dataclasses.replace(plain, logit_scale=0.5)
  params = drawn(Decoder(plain, Precision(), layout()), jax.random.key(0), ALL)
  whole, less = (applied(s, params, batches[0]["tokens"]) for s in (plain, half))
  np.testing.assert_array_equal(less, 0.5 * whole)


def test_decay_is_multiplied_with_what_a_user_gave():
  decay = ((r"embed", 0.0), (r"mlp/up", 0.3), (r".*", 1.0))
  spec = AdamW(lr=Constant(peak=1.0), decay=decay)
  made = mup(model(128), model(32), optimizer=AdamW, depth=None).optimizer(spec)
  found = {n: first_match(made.decay, NAMES[n]) for n in ("table", "q", "up", "norm")}
  assert found == pytest.approx({"table": 0.0, "q": 4.0, "up": 1.2, "norm": 1.0})


def test_sides_that_grow_unlike_have_rates_of_their_own():
  """Muon's update has the root of the longer side as its size; keys may stay few."""

  def wide(width, heads, kv_heads, hidden):
    block = Block(
      mixer=GQA(heads=heads, kv_heads=kv_heads, head_dim=16), mlp=GLU(hidden=hidden)
    )
    return LM(vocab=VOCAB, dim=width, pattern=(block,), repeats=1)

  new, old = wide(256, 16, 2, 512), wide(64, 4, 2, 256)
  made = mup(new, old, optimizer=Muon, depth=None)
  found = {rule.pattern: rule.lr for rule in made.rules}
  size = lambda i, o: (o / i / max(i, o)) ** 0.5  # noqa: E731
  assert found["mixer/q$"] == pytest.approx(size(256, 256) / size(64, 64))
  assert found["mixer/(k|v)$"] == pytest.approx(size(256, 32) / size(64, 32))
  assert found["mlp/(gate|up)$"] == pytest.approx(size(256, 512) / size(64, 256)) == 0.5
  assert found["mlp/down$"] == pytest.approx(size(512, 256) / size(256, 64)) == 1.0
  adam = {r.pattern: r.lr for r in mup(new, old, optimizer=AdamW, depth=None).rules}
  assert adam["mixer/(k|v)$"] == 1 / 4
  assert adam["mlp/down$"] == 1 / 2


def test_multipliers_of_the_base_are_kept():
  own = {"logit_scale": 0.5, "head": "untied"}
  new, old = (dataclasses.replace(model(w), **own) for w in (128, 32))
  assert mup(new, old, optimizer=AdamW, depth=None).model.logit_scale == 0.5 / 4


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: mup(model(64), model(32), optimizer=Adafactor, depth=None), "Adafactor"),
    (lambda: mup(model(64), model(32), optimizer=AdamW, depth=2.0), "depth: 2.0"),
    (
      lambda: mup(model(64, head="untied"), model(32), optimizer=AdamW, depth=None),
      "more than sizes: head",
    ),
    (
      lambda: mup(
        dataclasses.replace(model(64), prefix=model(64).pattern),
        model(32),
        optimizer=AdamW,
        depth=None,
      ),
      "another prefix",
    ),
    (
      lambda: mup(
        dataclasses.replace(model(64), softcap=30.0, logit_scale=0.5),
        model(32),
        optimizer=AdamW,
        depth=None,
      ),
      "more than sizes: logit_scale: .*softcap",
    ),
    (
      lambda: mup(
        dataclasses.replace(model(64), scores=1),
        dataclasses.replace(model(32), scores=1),
        optimizer=AdamW,
        depth=None,
      ),
      "scores: 1",
    ),
    (
      lambda: standard(model(64)).optimizer(
        AdamW(lr=Constant(peak=1.0), lr_scale=(("x", 2.0), (".*", 1.0)))
      ),
      "lr_scale: .*Leave it out",
    ),
    (
      lambda: transfer.coordinate_check([standard(model(64))], spec_of(), [], 0),
      "one width alone",
    ),
  ],
)
def test_refusals(call, words):
  with pytest.raises(InputError, match=words):
    call()


def test_every_axis_of_a_rule_is_a_leaf_s():
  """No pattern of the rules is dead."""
  big, base = model(64, head="untied", layers=4), model(32, head="untied")
  made = mup(big, base, optimizer=AdamW, depth=0.5)
  is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
  decoder = Decoder(big, Precision(), layout())
  names = named_leaves(axes_of(decoder), is_axes)
  taken = {
    first_match([(r.pattern, r.pattern) for r in made.rules] + [(".*", "")], name)
    for name in names
  }
  assert {rule.pattern for rule in made.rules} <= taken
