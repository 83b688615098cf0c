"""Optimizers: what all share, then each against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.errors import InputError
from jaxlm.training import optimizers, schedules
from jaxlm.training.optimizers import Adafactor, AdamW, Lion, Muon
from jaxlm.training.schedules import Constant
from jaxlm.training.state import First, axes_of, create
from jaxlm.trees import first_match, named_leaves
from training import small

# A rate at which each learns.
RATES = {AdamW: 1e-2, Adafactor: 1e-1, Lion: 2e-3, Muon: 1e-2}
KINDS = pytest.mark.parametrize("kind", RATES, ids=lambda kind: kind.__name__)

AXES = {
  "embed": {"table": ("vocab", "embed")},
  "layers": {
    "q": ("layers", "embed", "heads", "head_dim"),
    "o": ("layers", "heads", "head_dim", "embed"),
    "up": ("layers", "embed", "mlp"),
    "norm": {"scale": ("layers", "norm")},
  },
}
SHAPES = {
  "embed": {"table": (24, 16)},
  "layers": {
    "q": (3, 16, 2, 4),
    "o": (3, 2, 4, 16),
    "up": (3, 16, 40),
    "norm": {"scale": (3, 16)},
  },
}
IS_SHAPE = {"is_leaf": lambda leaf: isinstance(leaf, tuple)}


def draw(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: jnp.asarray(scale * rng.normal(size=s), jnp.float32), SHAPES, **IS_SHAPE
  )


def plain(kind, **fields):
  """No clipping, no decay, rate 1: the update is minus the optimizer's own scaling."""
  fixed = {"lr": Constant(peak=1.0), "clip": None, "weight_decay": 0.0}
  return kind(**{**fixed, **fields})


def updates_of(spec, grads, params=None):
  """Returns {name: update} for each tree of gradients in turn; parameters stay."""
  transform = optimizers.build(spec, 10, AXES).transform
  params = draw(99) if params is None else params
  state, out = transform.init(params), []
  for grad in grads:
    update, state = transform.update(grad, state, params)
    out.append({name: np.asarray(u) for name, u in named_leaves(update).items()})
  return out


def names(tree):
  return {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}


@pytest.fixture(scope="module")
def trained():
  """{kind: {mesh: (state, metrics)}} after three steps on one device and on eight."""
  runs = {}
  with jax.numpy_dtype_promotion("standard"):
    for kind, rate in RATES.items():
      spec = kind(lr=Constant(peak=rate))
      for name, mesh in (("one", small.ONE), ("mixed", small.MIXED)):
        compiled, first, _, decoder = small.setup(spec, mesh)
        steps = 24 if name == "one" else 3
        after_three = small.run(compiled, first, decoder.layout, 3)
        rows = small.run(compiled, first, decoder.layout, steps)[1]
        runs[kind, name] = (names(after_three[0].params), rows)
  return runs


@KINDS
def test_the_loss_falls(trained, kind):
  _, rows = trained[kind, "one"]
  losses = [row["loss"] for row in rows]
  assert losses[0] == pytest.approx(np.log(small.VOCAB), rel=0.1)
  assert np.mean(losses[-4:]) < losses[0] - 1.5, losses


@KINDS
def test_a_sharded_step_equals_the_one_device_step(trained, kind):
  """Relative to each leaf's norm, after three steps."""
  one, one_rows = trained[kind, "one"]
  mixed, mixed_rows = trained[kind, "mixed"]
  for row, wanted in zip(mixed_rows, one_rows[:3], strict=True):
    assert row == pytest.approx(wanted, rel=1e-5)
  for name, leaf in one.items():
    error = np.linalg.norm(mixed[name] - leaf) / np.linalg.norm(leaf)
    assert error < 1e-5, (name, error)


BYTES = {AdamW: 8.0, Lion: 4.0, Adafactor: 0.029, Muon: 4.73}


@KINDS
@pytest.mark.parametrize("params", ["float32", "bfloat16"])
def test_state_bytes_a_parameter_and_their_sharding(kind, params):
  """Statistics are float32; those of a parameter's shape are split as it is."""
  wide = small.MODEL.__class__(
    vocab=1024,
    dim=256,
    repeats=4,
    pattern=(
      small.Block(
        mixer=small.GQA(heads=4, kv_heads=2, head_dim=64), mlp=small.GLU(hidden=512)
      ),
    ),
  )
  decoder = small.decoder_of(small.MIXED, model=wide, params=params)
  built = optimizers.build(kind(lr=Constant(peak=1.0)), 10, axes_of(decoder))
  plan, _ = create(decoder, built.transform, First(0), ema=True)
  total = sum(leaf.size for leaf in jax.tree.leaves(plan.shapes.params))
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(plan.shapes.opt_state))
  print(f"{kind.__name__} {params}: {held / total:.3f} bytes a parameter")
  assert held / total == pytest.approx(BYTES[kind], rel=0.02)
  shardings = named_leaves(plan.shardings.params)
  state = named_leaves(plan.shardings.opt_state)
  matched = 0
  for name, leaf in named_leaves(plan.shapes.opt_state).items():
    for param, shape in named_leaves(plan.shapes.params).items():
      if name.endswith(f"/{param}") and leaf.shape == shape.shape:
        assert state[name] == shardings[param]
        assert leaf.dtype == jnp.float32
        matched += 1
  assert matched >= (2 if kind is Adafactor else len(shardings))
  assert {x.dtype for x in jax.tree.leaves(plan.shapes.ema)} == {jnp.dtype("float32")}
  assert {str(x.dtype) for x in jax.tree.leaves(plan.shapes.params)} == {params}


@KINDS
def test_decay_and_rate_go_by_the_first_rule_that_matches(kind):
  """Compared with neither, an update loses rate * decay * factor of the parameter."""
  grads, params = draw(1), draw(2)
  common = {"lr": Constant(peak=0.5), "clip": None}
  bare = updates_of(kind(weight_decay=0.0, **common), [grads], params)[0]
  decay = (("up$", 3.0), ("up|scale", 0.0), (".*", 1.0))
  decayed = updates_of(kind(weight_decay=0.2, decay=decay, **common), [grads], params)
  values = names(params)
  for name, update in decayed[0].items():
    factor = 3.0 if name.endswith("up") else 0.0 if "scale" in name else 1.0
    wanted = bare[name] - 0.5 * 0.2 * factor * values[name]
    np.testing.assert_allclose(update, wanted, rtol=1e-5, atol=1e-6, err_msg=name)
  scales = (("^layers/q", 0.1), ("layers", 2.0), ("", 1.0))
  spec = kind(weight_decay=0.0, lr_scale=scales, **common)
  scaled = updates_of(spec, [grads], params)
  for name, update in scaled[0].items():
    factor = 0.1 if name == "layers/q" else 2.0 if "layers" in name else 1.0
    np.testing.assert_allclose(update, factor * bare[name], rtol=1e-6, err_msg=name)


def test_default_decay_leaves_scales_and_biases_alone():
  spec = AdamW(lr=Constant(peak=1.0))
  rule = dict.fromkeys(["layers/0/norm/scale", "mixer/q_bias", "final_norm/bias"], 0.0)
  rule |= dict.fromkeys(["layers/0/mixer/q", "embed/table", "head"], 1.0)
  for name, factor in rule.items():
    assert optimizers.first_match(spec.decay, name) == factor


@pytest.mark.parametrize("field", ["decay", "lr_scale"])
def test_a_parameter_that_no_rule_matches(field):
  with pytest.raises(InputError, match=r"no rule matches the parameter 'embed/table'"):
    updates_of(AdamW(lr=Constant(peak=1.0), **{field: (("layers", 1.0),)}), [draw(0)])


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"clip": 0.0}, "optimizer.clip: 0.0 is not positive"),
    ({"weight_decay": -0.1}, "optimizer.weight_decay: -0.1 is negative"),
  ],
)
def test_errors(fields, words):
  with pytest.raises(InputError, match=words):
    AdamW(lr=Constant(peak=1.0), **fields)


def test_clipping_is_by_the_global_norm():
  """What is left after clipping is seen by an optimizer that is linear in its input."""
  grads = draw(3)
  total = float(optax.tree.norm(grads))
  # With b1 = b2 = 0 and a huge eps, Adam is gradient / eps.
  linear = {"b1": 0.0, "b2": 0.0, "eps": 1e6}
  free = updates_of(plain(AdamW, **linear), [grads])[0]
  loose = updates_of(plain(AdamW, clip=2 * total, **linear), [grads])[0]
  tight = updates_of(plain(AdamW, clip=total / 4, **linear), [grads])[0]
  for name, update in free.items():
    np.testing.assert_allclose(loose[name], update, rtol=1e-6)
    np.testing.assert_allclose(tight[name], update / 4, rtol=1e-4)


def test_the_rate_is_the_schedule_of_the_step():
  spec = plain(Lion, lr=schedules.WarmupLinear(peak=1.0, warmup=2))
  sizes = [np.abs(u["layers/up"]).max() for u in updates_of(spec, [draw(0)] * 4)]
  np.testing.assert_allclose(sizes, [0.0, 0.5, 1.0, 0.875])


def test_adamw_is_its_formula():
  grads = [draw(seed) for seed in (1, 2, 3)]
  b1, b2, eps = 0.8, 0.9, 1e-3
  got = updates_of(plain(AdamW, b1=b1, b2=b2, eps=eps), grads)
  for name in got[0]:
    m = v = 0.0
    for t, grad in enumerate(grads, 1):
      g = names(grad)[name].astype(np.float64)
      m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
      step = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
      np.testing.assert_allclose(got[t - 1][name], -step, rtol=1e-5, atol=1e-7)


def test_lion_is_its_formula():
  grads = [draw(seed) for seed in (1, 2, 3)]
  b1, b2 = 0.7, 0.95
  got = updates_of(plain(Lion, b1=b1, b2=b2), grads)
  for name in got[0]:
    m = 0.0
    for t, grad in enumerate(grads):
      g = names(grad)[name]
      np.testing.assert_array_equal(got[t][name], -np.sign(b1 * m + (1 - b1) * g))
      m = b2 * m + (1 - b2) * g


def adafactor_of(g, row, column, t, *, decay_rate):
  """Shazeer & Stern 2018, algorithm 4, one matrix; g is float64."""
  decay = 1 - t**-decay_rate
  row = decay * row + (1 - decay) * (g**2 + 1e-30).mean(axis=1)
  column = decay * column + (1 - decay) * (g**2 + 1e-30).mean(axis=0)
  v = np.outer(row, column) / row.mean()
  return g / np.sqrt(v), row, column


def test_adafactor_is_its_formula_layer_by_layer_and_over_joined_heads():
  """Of q, [L, D, H, K], the matrix is [D, H K]; its clip and scale see the stack."""
  grads, params = [draw(seed) for seed in (1, 2, 3)], draw(9)
  spec = plain(Adafactor, factored_from=8, clip_rms=0.5, decay_rate=0.7)
  got = updates_of(spec, grads, params)
  for name, split in (("layers/q", 2), ("layers/o", 3), ("layers/up", 2)):
    shape = got[0][name].shape
    size = (3, int(np.prod(shape[1:split])), int(np.prod(shape[split:])))
    scale = np.sqrt(np.mean(names(params)[name] ** 2))
    rows, columns = [0.0] * 3, [0.0] * 3
    for t, grad in enumerate(grads, 1):
      g = names(grad)[name].astype(np.float64).reshape(size)
      update = np.empty(size)
      for i in range(3):
        update[i], rows[i], columns[i] = adafactor_of(
          g[i], rows[i], columns[i], t, decay_rate=0.7
        )
      update /= max(1.0, np.sqrt(np.mean(update**2)) / 0.5)
      wanted = -(update * scale).reshape(shape)
      np.testing.assert_allclose(got[t - 1][name], wanted, rtol=2e-5, err_msg=name)


def newton_schulz(x, iterations=5):
  """Jordan et al. 2024, float64."""
  a, b, c = 3.4445, -4.7750, 2.0315
  wide = x.shape[0] <= x.shape[1]
  x = x if wide else x.T
  x = x / np.linalg.norm(x)
  for _ in range(iterations):
    gram = x @ x.T
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x if wide else x.T


# name: dims of one layer's matrix
MATRICES = {"layers/q": (16, 8), "layers/o": (8, 16), "layers/up": (16, 40)}


def test_muon_orthogonalizes_each_layer_with_heads_joined():
  """Singular values near 1 before the scale of 0.2 sqrt(longer side)."""
  update = updates_of(plain(Muon), [draw(1)])[0]
  for name, dims in MATRICES.items():
    for layer in update[name].reshape(3, *dims):
      values = np.linalg.svd(layer, compute_uv=False) / (0.2 * max(dims) ** 0.5)
      assert values.min() > 0.6, (name, values)
      assert values.max() < 1.3, (name, values)


def test_muon_is_its_formula_with_nesterov_momentum():
  """As in optax, momentum and gradient are corrected for their start (Dozat 2016)."""
  grads, beta = [draw(seed) for seed in (1, 2, 3)], 0.9
  got = updates_of(plain(Muon, momentum=beta, rms=0.3), grads)
  for name, dims in MATRICES.items():
    m = 0.0
    for t, grad in enumerate(grads, 1):
      g = names(grad)[name].astype(np.float64).reshape(3, *dims)
      m = beta * m + (1 - beta) * g
      ahead = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
      wanted = [-0.3 * max(dims) ** 0.5 * newton_schulz(layer) for layer in ahead]
      np.testing.assert_allclose(
        got[t - 1][name].reshape(3, *dims), wanted, rtol=1e-3, atol=1e-4
      )


def test_muon_gives_tables_and_norms_to_adamw():
  grads = [draw(seed) for seed in (1, 2)]
  muon = updates_of(plain(Muon, b1=0.8, b2=0.9, eps=1e-3), grads)
  adamw = updates_of(plain(AdamW, b1=0.8, b2=0.9, eps=1e-3), grads)
  for got, wanted in zip(muon, adamw, strict=True):
    same = {n for n in got if np.allclose(got[n], wanted[n], rtol=1e-6, atol=1e-7)}
    assert same == {"embed/table", "layers/norm/scale"}


def test_muon_takes_the_matrices_of_a_model_and_no_others():
  block = small.Block(
    mixer=small.GQA(heads=4, kv_heads=4, head_dim=8, bias="all"),
    mlp=small.GLU(hidden=64, bias="all"),
  )
  model = small.LM(vocab=264, dim=32, pattern=(block,), prefix=(block,), repeats=2)
  axes = axes_of(small.decoder_of(model=model))
  dims = jax.tree.map(optimizers.matrix_dims, axes, **IS_SHAPE)
  is_leaf = lambda x: x is None or isinstance(x, optimizers.MuonDimensionNumbers)  # noqa: E731
  found = {n for n, d in named_leaves(dims, is_leaf).items() if d is not None}
  parts = ["mixer/q", "mixer/k", "mixer/v", "mixer/o"]
  parts += ["mlp/up", "mlp/gate", "mlp/down"]
  assert found == {f"{at}/{part}" for at in ("prefix_0", "layers/0") for part in parts}
  assert named_leaves(dims, is_leaf)["prefix_0/mixer/o"] == ((0, 1), (2,))
  assert named_leaves(dims, is_leaf)["layers/0/mixer/q"] == ((1,), (2, 3))


@KINDS
def test_bfloat16_parameters_get_float32_statistics_and_updates(kind):
  """The update is the one that float32 parameters of the same values get."""
  low = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)  # noqa: E731
  params, grads = low(draw(1)), low(draw(2))
  got = updates_of(plain(kind), [grads] * 2, params)[1]
  as32 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
  wanted = updates_of(plain(kind), [as32(grads)] * 2, as32(params))[1]
  for name, update in got.items():
    assert update.dtype == np.float32
    np.testing.assert_array_equal(update, wanted[name])
  new = optimizers.moved(params, jax.tree.map(jnp.ones_like, as32(params)))
  assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}


def test_the_average_is_its_formula():
  average, params = draw(1), draw(2)
  got = names(optimizers.decayed(params, average, 0.9))
  for name, value in got.items():
    wanted = 0.9 * names(average)[name] + 0.1 * names(params)[name]
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
  ("name", "factor"),
  [
    ("mixer/q/a", 1.0), ("mixer/q/b", 1.0), ("mixer/q", 1.0), ("mixer/d", 0.0),
    ("mixer/q/magnitude", 0.0), ("mlp/down/inputs", 0.0), ("mixer/v/outputs", 0.0),
    ("embed/prompt", 0.0), ("mixer/prefix_k", 0.0), ("prefix_0/mlp/up", 1.0),
  ],
)  # fmt: skip
def test_what_means_nothing_at_zero_does_not_decay(name, factor):
  assert first_match(optimizers.DECAY_MATRICES, f"layers/0/{name}") == factor
