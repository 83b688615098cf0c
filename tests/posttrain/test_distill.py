"""Distillation in chunks against whole logits, on meshes, and its refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder, init, logits, unbox
from jaxlm.models.spec import GLU, GQA, LM, Block, Precision
from jaxlm.posttrain import distill
from jaxlm.posttrain.distill import Distill, Teacher
from jaxlm.posttrain.divergence import Divergence, divergence
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.placement import placer
from jaxlm.sharding.rules import Layout
from jaxlm.trees import named_leaves

VOCAB, B, T = 24, 4, 20
BLOCK = Block(mixer=GQA(heads=2, kv_heads=2, head_dim=8), mlp=GLU(hidden=16))
STUDENT = LM(vocab=VOCAB, dim=16, pattern=(BLOCK,), repeats=1, softcap=5.0)
TEACHER = dataclasses.replace(STUDENT, dim=8, softcap=None, head="tied")
MESHES = (Mesh(fsdp=1), Mesh(data=2, context=2, tensor=2), Mesh(fsdp=4, context=2))
SPECS = {
  "forward": Distill(teacher="", chunk=4, nll=0.3),
  "reverse, softer": Distill(
    teacher="", chunk=3, divergence=Divergence(kind="reverse", temperature=2.0)
  ),
  "jsd": Distill(teacher="", chunk=99, divergence=Divergence(kind="jsd", beta=0.3)),
  "all ids stored, softer": Distill(
    teacher="", chunk=4, nll=0.3, top_k=VOCAB, divergence=Divergence(temperature=2.0)
  ),
}


def rows():
  rng = np.random.default_rng(3)
  tokens = rng.integers(0, VOCAB, (B, T + 1)).astype(np.int32)
  return {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "segments": np.ones((B, T), np.int32),
    "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    "weights": rng.integers(0, 2, (B, T)).astype(np.float32),
  }


def made(mesh):
  layout = Layout(make_mesh(mesh, jax.devices()[:1] if mesh == MESHES[0] else None))
  return [Decoder(spec, Precision(), layout) for spec in (STUDENT, TEACHER)]


@functools.cache
def drawn():
  """The parameters of both, drawn on one device."""
  draw = jax.jit(
    lambda: [unbox(init(d, jax.random.key(i))) for i, d in enumerate(made(MESHES[0]))]
  )
  params, frozen = jax.tree.map(np.asarray, draw())
  frozen["embed"]["table"] = 20.0 * frozen["embed"]["table"]
  return params, frozen


def models(mesh):
  """Student, teacher and the parameters of both."""
  student, teacher = made(mesh)
  return student, teacher, *jax.device_put(drawn(), student.layout.sharding())


@functools.cache
def whole(name):
  """The loss and its gradient from all logits at once."""
  spec = SPECS[name]
  student, teacher, params, frozen = models(MESHES[0])
  batch = jax.tree.map(jnp.asarray, rows())

  def stream(decoder, params):
    x, _ = decoder.apply(
      {"params": params}, batch["tokens"], batch["positions"], batch["segments"]
    )
    return logits(decoder.spec, params, x)

  def loss(params):
    q, p = stream(student, params), stream(teacher, frozen)
    apart = divergence(spec.divergence, q, p)
    log_q = jax.nn.log_softmax(q)
    nll = -jnp.take_along_axis(log_q, batch["targets"][..., None], -1)
    total = jnp.sum((apart + spec.nll * nll[..., 0]) * batch["weights"])
    same = jnp.sum(jnp.where(q.argmax(-1) == p.argmax(-1), batch["weights"], 0.0))
    return total, same

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


# Every kind on the mesh that splits most; on the others those that differ most.
@pytest.mark.parametrize(
  ("name", "mesh"),
  [
    *((name, MESHES[1]) for name in SPECS),
    ("reverse, softer", MESHES[0]),
    ("all ids stored, softer", MESHES[0]),
    ("forward", MESHES[2]),
    ("all ids stored, softer", MESHES[2]),
  ],
)
def test_chunks_on_a_mesh_equal_whole_logits_on_a_device(name, mesh):
  spec = SPECS[name]
  student, teacher, params, frozen = models(mesh)
  batch = placer(student.layout.sharding("batch", "sequence"), (B, T))(rows())
  if spec.top_k:
    batch |= distill.top_log_probs(spec, teacher, frozen, batch)
  else:
    batch["frozen"] = {"teacher": frozen}
  task = distill.task(spec, student, Teacher(teacher, None, lambda: frozen))

  def loss(params):
    terms = task.objective(params, batch, jax.random.key(0))
    return terms.numerator, terms

  (total, terms), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  (wanted, same), theirs = whole(name)
  np.testing.assert_allclose(total, wanted, rtol=1e-5)
  assert float(terms.metrics["agreement"].numerator) == float(same)
  assert float(terms.denominator) == rows()["weights"].sum()
  theirs = named_leaves(theirs)
  for leaf, value in named_leaves(grads).items():
    scale = float(np.abs(theirs[leaf]).max())
    np.testing.assert_allclose(
      value, theirs[leaf], rtol=1e-4, atol=1e-5 * scale, err_msg=leaf
    )
    assert scale > 1e-6


def test_the_head_s_gradient_is_summed_in_float32():
  """However small the chunks, under a computation in bfloat16."""
  student, teacher, params, frozen = models(MESHES[0])
  student, teacher = (
    one.clone(precision=Precision(compute="bfloat16")) for one in (student, teacher)
  )
  batch = jax.tree.map(jnp.asarray, rows()) | {"frozen": {"teacher": frozen}}

  def head(chunk):
    spec = Distill(teacher="", chunk=chunk)
    task = distill.task(spec, student, Teacher(teacher, None, lambda: frozen))
    total = lambda p: task.objective(p, batch, jax.random.key(0)).numerator  # noqa: E731
    return jax.jit(jax.grad(total))(params)["head"]

  many, one = head(1), head(T)
  assert float(jnp.linalg.norm(many - one)) < 1e-4 * float(jnp.linalg.norm(one))


def test_the_logits_of_a_whole_row_are_never_held():
  """Neither the student's nor the teacher's, forward or backward."""
  spec = SPECS["forward"]
  student, teacher, params, frozen = models(MESHES[0])
  batch = jax.tree.map(jnp.asarray, rows()) | {"frozen": {"teacher": frozen}}
  task = distill.task(spec, student, Teacher(teacher, None, lambda: frozen))
  made = jax.make_jaxpr(
    jax.grad(lambda p: task.objective(p, batch, jax.random.key(0)).numerator)
  )(params)
  sizes = {var.aval.size for eqn in _equations(made.jaxpr) for var in eqn.outvars}
  assert B * spec.chunk * VOCAB in sizes
  assert B * T * VOCAB not in sizes


def _equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for value in eqn.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from _equations(inner)


@pytest.mark.parametrize(
  ("fields", "told"),
  [
    ({"nll": -1.0}, "objective.nll: -1.0 is negative"),
    ({"nll": float("nan")}, "objective.nll: nan is negative"),
    ({"chunk": 0}, "objective.chunk: 0 is not positive"),
    ({"top_k": -1}, "objective.top_k: -1 is negative"),
    (
      {"top_k": 4, "divergence": Divergence(kind="jsd")},
      "objective.top_k: 4 with divergence.kind=jsd",
    ),
  ],
)
def test_refusals(fields, told):
  with pytest.raises(InputError, match=told):
    Distill(teacher="", **fields)
