"""Adapters in the one loop: what trains, what is kept, what is refused."""

import contextlib
import dataclasses
import io
import json
import re
import shutil

import jax
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.interop.checkpoint import open_model
from jaxlm.models.decoder import Decoder, logits
from jaxlm.models.spec import Precision
from jaxlm.ops.weights import Lora
from jaxlm.peft.lora import LoRA
from jaxlm.peft.soft_prompt import Prompt
from jaxlm.peft.targets import merge
from jaxlm.posttrain.objectives import Reward
from jaxlm.quantization.formats import NF4
from jaxlm.runs import plan
from jaxlm.runs.convert import Convert
from jaxlm.runs.samples import Samples
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout
from jaxlm.training.metrics import TIMES
from jaxlm.trees import named_leaves
from runs import hooks, tiny_pairs

STEPS = 12
SMALL = LoRA(rank=4)


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
  """The workdir of a model that learned a little; it knows step 20, too."""
  workdir = tmp_path_factory.mktemp("base") / "w"
  with jax.numpy_dtype_promotion("standard"):
    tiny("steps=40", "evaluate_every=40", "checkpoints.every=20").run(workdir)
  return workdir


@pytest.fixture(scope="module")
def adapt(tiny, base, tmp_path_factory):
  """Makes a run that trains adapters beside it; rows are shared."""
  cache = str(tmp_path_factory.mktemp("rows"))

  def make(*overrides, adapters=SMALL, **fields):
    rate = "optimizer.lr=Constant(peak=0.02)"  # which does not depend on steps
    run = tiny(f"data.cache={cache}", rate, *overrides)
    return dataclasses.replace(run, initial=str(base), adapters=adapters, **fields)

  return make


@pytest.fixture(scope="module")
def whole_and_told(adapt, tmp_path_factory):
  """A run without interruption, and what it printed."""
  workdir = tmp_path_factory.mktemp("whole") / "w"
  with (
    jax.numpy_dtype_promotion("standard"),
    contextlib.redirect_stdout(io.StringIO()) as told,
  ):
    return adapt().run(workdir), told.getvalue()


@pytest.fixture(scope="module")
def whole(whole_and_told):
  return whole_and_told[0]


@pytest.fixture(scope="module")
def prompted(adapt, tmp_path_factory):
  """A run that trains a soft prompt, and is sampled."""
  samples = Samples(prompts=("ROMEO",), tokens=8)
  run = adapt("ema=none", adapters=Prompt(length=4), samples=samples)
  with jax.numpy_dtype_promotion("standard"):
    return run.run(tmp_path_factory.mktemp("prompted") / "w")


def losses(result):
  rows = [row for row in result.rows if "loss" in row]
  return [{n: v for n, v in row.items() if n not in TIMES} for row in rows]


def held_out(result):
  return [r["held_out/nll"] for r in result.rows if "held_out/nll" in r]


def test_adapters_learn_and_the_base_stays(whole, base, capsys):
  start, *_, end = held_out(whole)
  assert end < start
  read = open_model(base).params(whole.decoder)
  leaves = [x for x in jax.tree.leaves(whole.params, is_leaf=is_lora) if is_lora(x)]
  assert len(leaves) == 7
  wanted = named_leaves(read)
  for name, leaf in named_leaves(whole.params, is_lora).items():
    kept = leaf.base if is_lora(leaf) else leaf
    np.testing.assert_array_equal(kept, wanted[name], err_msg=name)


def is_lora(leaf):
  return isinstance(leaf, Lora)


def test_checkpoints_hold_adapters_alone(whole):
  """Values, both moments, the average; and a few counters."""
  kept = sum(leaf.size for leaf in hooks.leaves_of(last(whole.workdir)).values())
  trained = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64))
  assert 0 <= kept - 4 * trained < 10


def test_a_run_s_workdir_opens_as_the_merged_model(whole):
  """From the files alone: base, adapters and their average."""
  opened = open_model(whole.workdir)
  read = opened.params(whole.decoder)
  ids = jax.random.randint(jax.random.key(0), (8, 12), 0, 256)

  def outputs(params):
    x_BTD, _ = whole.decoder.apply({"params": params}, ids)
    return logits(whole.decoder.spec, params, x_BTD)

  np.testing.assert_allclose(outputs(read), outputs(whole.params), atol=2e-5)
  assert float(np.abs(outputs(read) - outputs(open_model_base(whole))).max()) > 0.01


def open_model_base(whole):
  return jax.tree.map(
    lambda leaf: leaf.base if is_lora(leaf) else leaf, whole.params, is_leaf=is_lora
  )


def same_arrays(ours, theirs):
  ours, theirs = hooks.leaves_of(ours), hooks.leaves_of(theirs)
  assert ours.keys() == theirs.keys()
  for name, leaf in theirs.items():
    np.testing.assert_array_equal(ours[name], leaf, strict=True, err_msg=name)


def last(workdir):
  return workdir / "checkpoints" / f"{STEPS:08d}"


def test_resume_is_exact_to_the_bit(adapt, whole, copy, capsys):
  """Rows past the step that it goes on from are made again."""
  place = copy(whole.workdir, newest=4)
  again = adapt().run(place)
  assert "going on from the checkpoint of step 4" in capsys.readouterr().out
  assert losses(again) == losses(whole)
  same_arrays(last(place), last(whole.workdir))


@pytest.mark.parametrize(
  "words",
  [
    ("mesh.fsdp=1", "mesh.data=8", "moments.memory=host"),
    ("mesh.fsdp=4", "mesh.tensor=2", "accumulate=2"),
  ],
)
def test_meshes_and_micro_batches_change_nothing(words, adapt, whole, tmp_path):
  many = adapt("steps=3", *words).run(tmp_path / "w")
  for ours, theirs in zip(losses(many), losses(whole), strict=False):
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-4)


def test_a_finished_run_is_read_back(adapt, whole, tmp_path, copy, capsys):
  again = adapt().run(copy(whole.workdir, newest=STEPS))
  assert "this run is finished" in capsys.readouterr().out
  for one, other in zip(
    jax.tree.leaves(again.params), jax.tree.leaves(whole.params), strict=True
  ):
    np.testing.assert_array_equal(one, other)


def test_the_run_says_what_trains(whole_and_told):
  _, told = whole_and_told
  trained = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64))
  assert f"adapters: LoRA trains {trained:,} parameters in 14 leaves" in told
  assert "frozen beside them: 0.1 MB, 32.000 bits a parameter" in told


def test_a_wrong_base_is_refused(adapt, whole, base, copy):
  """On resuming, and where the run's folder is opened as a model."""
  place = copy(whole.workdir, newest=8)
  other = copy(base, newest=20, name="other")
  before = json.loads((place / "config.json").read_text())
  run = dataclasses.replace(adapt(), initial=str(other))
  before["initial"] = str(other)
  (place / "config.json").write_text(json.dumps(before))
  with pytest.raises(InputError, match=r"initial: these weights are .* beside"):
    run.run(place)  # the path may change, the weights may not
  with pytest.raises(InputError, match=r"adapters were trained beside the weights"):
    open_model(place).params(whole.decoder)


def test_quantized(adapt, tmp_path, copy, capsys):
  """The base in NF4: learns, resumes to the bit, opens as what was trained.

  Some of its matrices have adapters, others none.
  """
  few = LoRA(rank=4, targets=("mixer/[qo]$", "mlp/down$"))
  fields = {"quantized": NF4(block=4), "adapters": few}
  run = adapt("ema=none", **fields)
  result = run.run(tmp_path / "a")
  start, *_, end = held_out(result)
  assert end < start
  place = copy(tmp_path / "a", newest=4)
  run.run(place)
  same_arrays(last(tmp_path / "a"), last(place))
  assert "going on from the checkpoint of step 4" in capsys.readouterr().out
  read = open_model(tmp_path / "a").params(result.decoder)
  told = capsys.readouterr().out
  assert "merged into the weights as NF4" in told
  (apart,) = re.findall(r"difference of a logit is ([\d.e-]+), of", told)
  assert float(apart) < 1e-4
  for name, leaf in named_leaves(merge(result.params)).items():
    np.testing.assert_allclose(
      named_leaves(read)[name], leaf, rtol=1e-5, atol=1e-6, err_msg=name
    )
  many = adapt("ema=none", "steps=2", "mesh.fsdp=4", "mesh.tensor=2", **fields)
  for ours, theirs in zip(
    losses(many.run(tmp_path / "c")), losses(result), strict=False
  ):
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  """The path of forty pairs."""
  file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
  rows = [{"prompt": f"{i}", "chosen": "yes" * 9, "rejected": "no"} for i in range(40)]
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(file)


def test_a_reward_model_s_new_head_trains_too(pairs, tiny, base, tmp_path):
  run = dataclasses.replace(
    tiny_pairs.get_config(pairs=pairs),
    model=dataclasses.replace(tiny().model, scores=1),
    objective=Reward(),
    initial=str(base),
    adapters=SMALL,
    also=("^score$",),
  )
  result = run.run(tmp_path / "w")
  assert losses(result)[-1]["loss"] < losses(result)[0]["loss"]
  read = named_leaves(open_model(tmp_path / "w").params(result.decoder))
  wanted = named_leaves(merge(result.params))
  assert read.keys() == wanted.keys()
  for name, leaf in wanted.items():
    np.testing.assert_allclose(read[name], leaf, atol=1e-6, err_msg=name)
  two, four = (
    hooks.leaves_of(tmp_path / "w" / "checkpoints" / f"{step:08d}") for step in (2, 4)
  )
  (score,) = (name for name in four if re.fullmatch("params/.*score", name))
  assert not np.array_equal(two[score], four[score])
  with pytest.raises(InputError, match="also: layers/0/mixer/q has adapters"):
    dataclasses.replace(run, also=("mixer/q$",)).run(tmp_path / "x")


def test_a_soft_prompt_in_the_loop(prompted):
  """Learns, is sampled, and its workdir opens with it."""
  start, *_, end = held_out(prompted)
  assert end < start
  assert "ROMEO" in (prompted.workdir / "samples.txt").read_text()
  read = open_model(prompted.workdir).params(prompted.decoder)
  wanted = named_leaves(prompted.params)
  assert "layers/0/mixer/prefix_k" in wanted
  for name, leaf in named_leaves(read).items():
    np.testing.assert_allclose(leaf, wanted[name], atol=1e-6, err_msg=name)


def test_references_are_the_base_s_and_cost_nothing(pairs, tmp_path, tiny, base):
  """DPO beside a frozen base: its own log-probabilities, and no second model."""
  run = dataclasses.replace(
    tiny_pairs.get_config(pairs=pairs),
    model=tiny().model,
    initial=str(base),
  )
  beside = dataclasses.replace(run, adapters=SMALL)
  found = losses(beside.run(tmp_path / "beside"))
  assert found[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
  assert found[-1]["loss"] < found[0]["loss"]
  (target,) = plan.launch.targets("h100:8")
  told = [plan.report(plan.prepare(r, target)).predicted for r in (run, beside)]
  assert told[1].frozen == told[0].parameters > 0
  assert told[0].frozen == 0


@pytest.mark.parametrize(
  ("fields", "told"),
  [
    ({"initial": None}, "adapters: they train beside a model; name it in initial"),
    ({"adapters": None, "quantized": NF4()}, "quantized: only a frozen model is"),
  ],
)
def test_refused_at_once(fields, told, adapt):
  with pytest.raises(InputError, match=told):
    dataclasses.replace(adapt(), **fields)


def test_refused_before_training(adapt, tmp_path):
  for adapters, told in (
    (LoRA(rank=65), "adapters.rank: 65 is larger than"),
    (LoRA(targets=("mixer/w",)), "adapters.targets: 'mixer/w' finds nothing"),
  ):
    with pytest.raises(InputError, match=told):
      adapt(adapters=adapters).run(tmp_path / "w")
  with pytest.raises(InputError, match=r"NF4.block: 64 does not divide the 32 outputs"):
    adapt(quantized=NF4()).run(tmp_path / "w")
  with pytest.raises(InputError, match=r"quantized: NF4.* on this mesh"):
    adapt("mesh.tensor=1", "mesh.fsdp=8", quantized=NF4(block=8)).run(tmp_path / "w")


def test_a_run_s_adapters_go_to_peft_and_back(whole, tmp_path):
  """Alone, and merged into a model's own folder."""
  source = str(whole.workdir)
  told = Convert(
    source=source, target=str(tmp_path / "peft"), form="peft", context=64
  ).run()
  assert told["largest difference after a round trip"] == 0.0
  assert told["leaves"] == 14
  merged = tmp_path / "merged"
  Convert(source=source, target=str(merged), form="jaxlm", tokenizer="without").run()
  read, wanted = (open_model(p).params(whole.decoder) for p in (merged, whole.workdir))
  jax.tree.map(np.testing.assert_array_equal, read, wanted)
  with pytest.raises(InputError, match="is no run that trained adapters"):
    Convert(source=str(merged), target=str(tmp_path / "x"), form="peft").run()


def test_adapters_beside_adapters_on_any_mesh(adapt, whole, tmp_path):
  """What they were trained beside is known by what was read, not by its sums."""
  words = ("steps=3", "mesh.fsdp=4", "mesh.tensor=2")
  second = dataclasses.replace(adapt(*words), initial=str(whole.workdir))
  result = second.run(tmp_path / "w")
  layout = Layout(make_mesh(Mesh(), jax.devices()[:1]))
  read = open_model(tmp_path / "w").params(whole.decoder.clone(layout=layout))
  wanted = named_leaves(merge(result.params))
  for name, leaf in named_leaves(read).items():
    np.testing.assert_allclose(leaf, wanted[name], atol=1e-5, err_msg=name)
  one = dataclasses.replace(second, steps=4, mesh=Mesh())
  assert one.run(tmp_path / "w").step == 4


def test_a_base_that_moved_is_found_again(adapt, base, tmp_path, monkeypatch):
  kept = tmp_path / "kept"
  shutil.copytree(base, kept)
  monkeypatch.chdir(tmp_path)
  dataclasses.replace(adapt("steps=3"), initial="kept").run(tmp_path / "w")
  decoder = Decoder(adapt().model, Precision(), Layout(make_mesh(Mesh())))
  monkeypatch.chdir("/")
  open_model(tmp_path / "w").params(decoder)
  kept.rename(tmp_path / "moved")
  with pytest.raises(InputError, match=r"initial, in .*config.json: .*kept does not"):
    open_model(tmp_path / "w").params(decoder)
  there = dataclasses.replace(adapt("steps=4"), initial=str(tmp_path / "moved"))
  assert there.run(tmp_path / "w").step == 4


def test_no_run_or_folder_takes_a_soft_prompt(adapt, prompted, tmp_path):
  told = r"holds layers/0/mixer/prefix_k, which is no part of the architecture"
  source, target = str(prompted.workdir), str(tmp_path / "x")
  with pytest.raises(InputError, match=told):
    Convert(source=source, target=target, context=64, tokenizer="without").run()
  with pytest.raises(InputError, match=told):
    Convert(source=source, target=target, form="jaxlm", tokenizer="without").run()
  with pytest.raises(InputError, match=told):
    dataclasses.replace(adapt(), initial=source).run(tmp_path / "v")


def test_a_bfloat16_run_s_adapters_are_written(adapt, tmp_path):
  run = adapt("steps=1", "precision.params=bfloat16")
  run.run(tmp_path / "w")
  target = str(tmp_path / "x")
  Convert(source=str(tmp_path / "w"), target=target, form="peft", context=64).run()
