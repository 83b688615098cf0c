import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.posttrain.divergence import Divergence, divergence, from_top_k
from tests.posttrain.goldens import CASES, LOOSE, golden, same

NAN, INF = float("nan"), float("inf")
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def spec_of(beta: float, temperature: float = 1.0) -> Divergence:
  """The goldens number forward 0 and reverse 1."""
  if beta in (0.0, 1.0):
    kind = "reverse" if beta else "forward"
    return Divergence(kind=kind, temperature=temperature)
  return Divergence(kind="jsd", beta=beta, temperature=temperature)


def mean_and_grad(spec: Divergence, dtype):
  """Over the tokens that have a label."""
  student, teacher = (
    golden(f"gkd/in/{name}_logits", dtype) for name in ("student", "teacher")
  )
  weights_N = (golden("gkd/in/labels") != -100).astype(dtype).reshape(-1)
  V = student.shape[-1]

  def loss(student):
    per_N = divergence(
      spec, student.reshape(-1, V), jnp.asarray(teacher.reshape(-1, V))
    )
    return jnp.sum(per_N * weights_N) / weights_N.sum()

  return jax.value_and_grad(loss)(jnp.asarray(student))


@pytest.mark.parametrize(("dtype", "tolerance"), CASES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradients_are_the_goldens(beta, temperature, dtype, tolerance):
  with jax.enable_x64(dtype is np.float64):
    value, grad = mean_and_grad(spec_of(beta, temperature), dtype)
    assert value.dtype == dtype
  name = f"gkd/beta{beta}_T{temperature}"
  assert same(value, golden(f"{name}/loss"), tolerance)
  assert same(grad, golden(f"{name}/grad/student_logits"), tolerance)


@pytest.mark.parametrize("beta", BETAS)
def test_another_spec_does_not_agree(beta):
  wanted = golden(f"gkd/beta{beta}_T1.0/loss")
  others = [spec_of(beta, 1.1), spec_of(1.0 - beta if beta != 0.5 else 0.6)]
  for other in others:
    assert not same(mean_and_grad(other, np.float32)[0], wanted, LOOSE)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_wider_teacher_gives_the_goldens(beta):
  """From residual streams of other dims than each other, as a trainer has them."""
  student, teacher = (
    golden(f"distill/in/h_{side}", np.float32) @ golden(f"distill/in/w_{side}").T
    for side in "st"
  )
  mask_N = golden("distill/in/mask").reshape(-1).astype(np.float32)
  logits = [jnp.asarray(x.reshape(mask_N.size, -1)) for x in (student, teacher)]
  mean = jnp.sum(divergence(spec_of(beta), *logits) * mask_N) / mask_N.sum()
  assert same(mean, golden(f"distill/beta{beta}/loss"), LOOSE)


@pytest.mark.parametrize("beta", BETAS)
def test_only_the_student_learns(beta):
  keys = jax.random.split(jax.random.key(0))
  logits = [5.0 * jax.random.normal(key, (3, 8)) for key in keys]

  def total(student_NV, teacher_NV):
    return divergence(spec_of(beta), student_NV, teacher_NV).sum()

  student, teacher = jax.grad(total, argnums=(0, 1))(*logits)
  assert np.any(student)
  assert not np.any(teacher)


@pytest.mark.parametrize("beta", BETAS)
def test_of_a_distribution_from_itself_nothing_is_left(beta):
  logits_NV = 5.0 * jax.random.normal(jax.random.key(0), (3, 8))
  per_N, vjp = jax.vjp(
    lambda x_NV: divergence(spec_of(beta), x_NV, logits_NV), logits_NV
  )
  np.testing.assert_allclose(per_N, 0.0, atol=1e-6)
  np.testing.assert_allclose(vjp(jnp.ones(3))[0], 0.0, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_far_distributions_stay_finite_in_half_precision(beta):
  student_NV = jnp.asarray([[300.0, -300.0, 0.0]], jnp.bfloat16)
  teacher_NV = jnp.asarray([[-300.0, 300.0, 0.0]], jnp.bfloat16)

  def total(x_NV):
    return divergence(spec_of(beta), x_NV, teacher_NV).sum()

  value, grad_NV = jax.value_and_grad(total)(student_NV)
  assert value.dtype == jnp.float32
  wanted = (
    600.0 if beta in (0.0, 1.0) else -beta * np.log(beta) - (1 - beta) * np.log1p(-beta)
  )
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  assert np.isfinite(grad_NV.astype(np.float32)).all()


def top(spec: Divergence, teacher_NV, k: int):
  log_probs_NV = jax.nn.log_softmax(teacher_NV / spec.temperature)
  return reversed(jax.lax.top_k(log_probs_NV, k))


def logits_pair():
  keys = jax.random.split(jax.random.key(1))
  return [3.0 * jax.random.normal(key, (5, 12)) for key in keys]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_of_the_teacher_is_the_whole_divergence(temperature):
  spec = Divergence(temperature=temperature)
  student_NV, teacher_NV = logits_pair()
  ids_NV, log_probs_NV = top(spec, teacher_NV, 12)
  whole_N, whole = jax.vjp(lambda x_NV: divergence(spec, x_NV, teacher_NV), student_NV)
  found_N, found = jax.vjp(
    lambda x_NV: from_top_k(spec, x_NV, ids_NV, log_probs_NV), student_NV
  )
  np.testing.assert_allclose(found_N, whole_N, rtol=1e-5)
  ones_N = jnp.ones(5)
  np.testing.assert_allclose(found(ones_N)[0], whole(ones_N)[0], atol=2e-6)


@pytest.mark.parametrize("k", [1, 4, 11])
def test_the_rest_is_one_bucket(k):
  """Against numpy in float64; and a gradient by hand: q inside each bucket, less p."""
  spec = Divergence()
  student_NV, teacher_NV = logits_pair()
  ids_NK, log_probs_NK = top(spec, teacher_NV, k)
  found_N, vjp = jax.vjp(
    lambda x_NV: from_top_k(spec, x_NV, ids_NK, log_probs_NK), student_NV
  )
  grad_NV = vjp(jnp.ones(5))[0]
  whole_N = divergence(spec, student_NV, teacher_NV)
  assert np.all(found_N <= whole_N + 1e-5)
  for n in range(5):
    q, p = (np.exp(np.float64(x[n])) for x in (student_NV, teacher_NV))
    q, p = q / q.sum(), p / p.sum()
    ids = np.asarray(ids_NK[n])
    others = np.setdiff1d(np.arange(12), ids)
    kept = (p[ids] * np.log(p[ids] / q[ids])).sum()
    rest = p[others].sum() * np.log(p[others].sum() / q[others].sum())
    np.testing.assert_allclose(found_N[n], kept + rest, rtol=1e-4)
    grad = q - p
    grad[others] = q[others] - q[others] * p[others].sum() / q[others].sum()
    np.testing.assert_allclose(grad_NV[n], grad, atol=1e-5)


def test_the_bucket_is_zero_where_the_student_agrees():
  spec = Divergence()
  student_NV, _ = logits_pair()
  ids_NK, log_probs_NK = top(spec, student_NV, 3)
  found_N = from_top_k(spec, student_NV, ids_NK, log_probs_NK)
  np.testing.assert_allclose(found_N, 0.0, atol=1e-6)
  shifted_NK = log_probs_NK - 0.1
  assert np.all(from_top_k(spec, student_NV, ids_NK, shifted_NK) > 1e-4)


def test_unused_places_and_rounded_masses_are_no_trouble():
  spec = Divergence()
  student_NV, teacher_NV = logits_pair()
  ids_NK, log_probs_NK = top(spec, teacher_NV, 3)
  wanted_N = from_top_k(spec, student_NV, ids_NK, log_probs_NK)
  # Unused places hold id 0, which may be a stored id as well.
  padded = jnp.pad(ids_NK, ((0, 0), (0, 2)))
  padded_log_probs = jnp.pad(log_probs_NK, ((0, 0), (0, 2)), constant_values=-jnp.inf)
  found_N = from_top_k(spec, student_NV, padded, padded_log_probs)
  np.testing.assert_allclose(found_N, wanted_N, rtol=1e-6)

  # A teacher that is certain; masses that add up to more than 1.
  for log_probs in ([0.0, -INF], [-0.69, -0.69]):
    log_probs_NK = jnp.float32([log_probs] * 5)

    def total(x_NV, log_probs_NK=log_probs_NK):
      return from_top_k(spec, x_NV, ids_NK[:, :2], log_probs_NK).sum()

    value, grad_NV = jax.value_and_grad(total)(student_NV)
    assert np.isfinite(value)
    assert np.isfinite(grad_NV).all()


def test_only_forward_can_be_had_from_the_top():
  student_NV, teacher_NV = logits_pair()
  for kind in ("reverse", "jsd"):
    spec = Divergence(kind=kind)
    with pytest.raises(
      InputError, match=f"divergence.kind: {kind} needs the teacher's"
    ):
      from_top_k(spec, student_NV, *top(spec, teacher_NV, 2))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"kind": "kl"}, "divergence.kind: 'kl' is not one of forward"),
    ({"beta": 0.0}, "divergence.beta: 0.0"),
    ({"beta": 1.0}, "divergence.beta: 1.0"),
    ({"beta": NAN}, "divergence.beta: nan"),
    ({"temperature": 0.0}, "divergence.temperature: 0.0"),
    ({"temperature": INF}, "divergence.temperature: inf"),
  ],
)
def test_what_no_spec_can_be(fields, message):
  with pytest.raises(InputError, match=message):
    Divergence(**fields)
