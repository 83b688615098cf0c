"""Every objective: packing, micro-batches and the mesh change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data import packing
from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder, head_weight, init, unbox
from jaxlm.models.spec import GLU, GQA, LM, Block, Precision
from jaxlm.posttrain import distill, objectives
from jaxlm.posttrain.contrastive import cpo, orpo, simpo
from jaxlm.posttrain.distill import Distill, Teacher
from jaxlm.posttrain.divergence import Divergence
from jaxlm.posttrain.kto import KTO
from jaxlm.posttrain.objectives import Preference, Reward, StepReward, Unpaired
from jaxlm.posttrain.preference import DPO
from jaxlm.posttrain.reward import BradleyTerry
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.placement import placer
from jaxlm.sharding.rules import Layout
from jaxlm.training.objective import NextToken
from jaxlm.training.step import accumulate
from jaxlm.trees import named_leaves

LENGTH, VOCAB, ROWS, PER_ROW = 40, 32, 8, 5
ONE, MIXED = Mesh(fsdp=1), Mesh(data=2, fsdp=2, tensor=2)
BLOCK = Block(mixer=GQA(heads=2, kv_heads=2, head_dim=8), mlp=GLU(hidden=16))

OBJECTIVES = {
  "sft": NextToken(chunk=16),
  "dft": NextToken(chunk=16, dft=True),
  "dpo": Preference(chunk=16),
  "dpo, tails at a half": Preference(loss=DPO(length_tail=0.5), chunk=16),
  "wpo": Preference(loss=DPO(wpo=True), chunk=16),
  "mpo": Preference(
    loss=DPO(losses=(("sigmoid", 0.8), ("bco", 0.2), ("sft", 1.0))), chunk=16
  ),
  "aot": Preference(loss=DPO(losses=(("aot", 1.0),)), chunk=16),
  "cpo": Preference(loss=cpo(), chunk=16),
  "simpo": Preference(loss=simpo(), chunk=16),
  "orpo": Preference(loss=orpo(), chunk=16),
  "kto": Unpaired(chunk=16),
  "apo, unpaired": Unpaired(loss=KTO(method="apo_zero_unpaired"), chunk=16),
  "reward": Reward(loss=BradleyTerry(margin=True, center=0.01)),
  "step reward": StepReward(),
  "distill": Distill(teacher="", nll=0.5, chunk=16),
  "distill, jsd": Distill(teacher="", divergence=Divergence(kind="jsd"), chunk=16),
  "distill, top 4": Distill(teacher="", top_k=4, chunk=16),
}


def sequences_of(spec) -> int:
  if isinstance(spec, Preference | Reward):
    return 2
  return 2 if isinstance(spec, Unpaired) and spec.loss.method == "kto" else 1


def examples(sequences: int) -> int:
  return 14 if sequences == 2 else 28


def unit(rng, sequences: int) -> dict[str, np.ndarray]:
  """An example: a prompt of 2 to 4 tokens and completions of 1 to 5."""
  prompt = rng.integers(1, VOCAB, rng.integers(2, 5))
  fields = {
    n: [] for n in ("tokens", "weights", "values", "labels", "part", "reference")
  }
  value = float(rng.integers(0, 2))
  for part in range(sequences):
    answer = rng.integers(1, VOCAB, rng.integers(1, 6))
    tokens = np.concatenate([prompt, answer])
    spoken = np.arange(len(tokens)) >= len(prompt)
    fields["tokens"].append(tokens)
    fields["weights"].append(spoken.astype(np.float32))
    fields["values"].append(np.full(len(tokens), value, np.float32))
    labels = np.where(spoken, rng.integers(0, 2, len(tokens)), -1)
    fields["labels"].append(labels.astype(np.int32))
    fields["part"].append(np.full(len(tokens), part))
    # Of what follows a token: under its sequence's last one stands nothing.
    fields["reference"].append(rng.normal(-5, 1, len(tokens)).astype(np.float32))
  return {name: np.concatenate(values) for name, values in fields.items()}


@functools.cache
def batch(sequences: int, padded: bool, count: int) -> dict[str, np.ndarray]:
  """Rows of packed examples, eight and then empty ones, or a row for each example."""
  rng = np.random.default_rng(7)
  units = [unit(rng, sequences) for _ in range(examples(sequences))]
  dtypes = {name: values.dtype for name, values in units[0].items() if name != "part"}
  lengths = np.array([len(u["tokens"]) for u in units])
  plan = packing.plan(lengths, LENGTH, 1 if padded else PER_ROW)
  rows = packing.rows(
    plan, units.__getitem__, dtypes, seq_len=LENGTH, block=99, sequences=sequences
  )
  fields = {n: np.concatenate(v) for n, v in _columns(rows).items()}
  assert len(fields["tokens"]) <= (len(units) if padded else ROWS)
  assert padded or fields["segments"].max() > 2 * sequences  # rows are shared
  fields = {
    name: np.pad(values, ((0, count - len(values)), (0, 0)))
    for name, values in fields.items()
  }
  return packing.examples(fields.pop("tokens"), fields.pop("segments"), fields)


def _columns(blocks):
  columns: dict[str, list[np.ndarray]] = {}
  for block in blocks:
    for name, values in block.items():
      columns.setdefault(name, []).append(values)
  return columns


@functools.cache
def drawn(model: LM, seed: int):
  """The first parameters, drawn on one device."""
  decoder = Decoder(model, Precision(), Layout(make_mesh(ONE, jax.devices()[:1])))
  draw = jax.jit(lambda: unbox(init(decoder, jax.random.key(seed))))
  return jax.device_get(draw())


@functools.cache
def program(name: str, mesh: Mesh, micro_batches: int):
  """Returns (decoder, teacher, the compiled sums over a batch)."""
  spec = OBJECTIVES[name]
  devices = jax.devices()[:1] if mesh == ONE else None
  layout = Layout(make_mesh(mesh, devices))
  model = LM(
    vocab=VOCAB,
    dim=16,
    pattern=(BLOCK,),
    repeats=1,
    scores=objectives.SCORES.get(type(spec)),
  )
  decoder = Decoder(model, Precision(), layout)
  teacher = teacher_of(spec, decoder)
  task = objectives.build(spec, decoder, PER_ROW, teacher)
  run = jax.jit(lambda p, b: accumulate(task, p, b, jax.random.key(1), micro_batches))
  return decoder, teacher, run


def found(name: str, rows: dict[str, np.ndarray], *, mesh=ONE, micro_batches=1):
  """Returns {"loss", metrics, gradients by name}, each divided as the step does."""
  spec = OBJECTIVES[name]
  decoder, teacher, run = program(name, mesh, micro_batches)
  layout = decoder.layout
  params = jax.device_put(drawn(decoder.spec, 0), layout.sharding())
  shape = rows["tokens"].shape
  placed = placer(layout.sharding("batch", "sequence"), shape)(rows)
  if teacher is not None:
    frozen = teacher.load()
    stored = {}
    if spec.top_k:
      stored = distill.top_log_probs(spec, teacher.decoder, frozen, placed)
    placed |= stored or {"frozen": {"teacher": frozen}}
  terms, grads = jax.device_get(run(params, placed))
  out = {"loss": terms.numerator / terms.denominator}
  out |= {n: r.numerator / r.denominator for n, r in terms.metrics.items()}
  return out | {n: g / terms.denominator for n, g in named_leaves(grads).items()}


def teacher_of(spec, student: Decoder) -> Teacher | None:
  """Returns a narrower model, sharper than a drawn one."""
  if not isinstance(spec, Distill):
    return None
  decoder = Decoder(
    dataclasses.replace(student.spec, dim=8), Precision(), student.layout
  )

  def load():
    params = drawn(decoder.spec, 9)
    params = params | {"head": 20.0 * params["head"]}
    return jax.device_put(params, decoder.layout.sharding())

  return Teacher(decoder, None, load)


def require_close(ours, theirs, *, but=()):
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    if name not in but:
      scale = max(float(np.abs(value).max()), 1e-3)
      np.testing.assert_allclose(
        ours[name], value, rtol=2e-5, atol=1e-5 * scale, err_msg=name
      )


@functools.cache
def plain(name):
  """Of packed rows, in the shape of the padded ones: both are one program."""
  sequences = sequences_of(OBJECTIVES[name])
  return found(name, batch(sequences, False, examples(sequences)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_equals_padded(name):
  sequences = sequences_of(OBJECTIVES[name])
  rows = batch(sequences, True, examples(sequences))
  require_close(plain(name), found(name, rows), but=("padding",))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_on_a_mesh_equal_one_batch_on_a_device(name):
  sequences = sequences_of(OBJECTIVES[name])
  rows = batch(sequences, False, ROWS)
  micro_batches = 1 if name == "aot" else 2  # which is refused for what sorts a batch
  there = found(name, rows, mesh=MIXED, micro_batches=micro_batches)
  here = plain(name)
  if "padding" in here:  # whose empty rows count
    empty = examples(sequences) - ROWS
    share = (here["padding"] * (ROWS + empty) - empty) / ROWS
    here = here | {"padding": share}
  require_close(there, here)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_gradient_reaches_every_parameter(name):
  for leaf, value in plain(name).items():
    if "/" in leaf or leaf in ("head", "score"):
      assert np.abs(value).max() > 1e-6, leaf
      assert np.isfinite(value).all(), leaf


def test_the_baseline_of_kto_is_not_clipped_away_here():
  assert plain("kto")["kl"] > 0.05


def test_a_reward_model_has_no_logits():
  model = LM(vocab=VOCAB, dim=16, pattern=(BLOCK,), repeats=1, head="tied", scores=1)
  with pytest.raises(InputError, match=r"model.scores: 1; a reward model has no"):
    head_weight(model, {"embed": {"table": jnp.zeros((VOCAB, 16))}})
