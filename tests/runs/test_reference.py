"""Preferences in the one loop: the reference is made once and is the right one."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jaxlm import files
from jaxlm.data.conversations import Preferences
from jaxlm.data.spec import Data, Weighted
from jaxlm.data.tokenizers import Bytes
from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder, init, unbox
from jaxlm.models.spec import GLU, GQA, LM, Block, Precision
from jaxlm.posttrain.objectives import Preference, Reward
from jaxlm.posttrain.reward import BradleyTerry
from jaxlm.runs import reference
from jaxlm.runs.samples import Samples
from jaxlm.runs.train import Train
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.metrics import TIMES
from jaxlm.training.objective import NextToken
from jaxlm.training.optimizers import AdamW
from jaxlm.training.schedules import Constant
from runs import hooks

STEPS = 8
RECORD = "reference.json"
BLOCK = Block(mixer=GQA(heads=2, kv_heads=2, head_dim=8), mlp=GLU(hidden=32))
MODEL = LM(vocab=264, dim=16, pattern=(BLOCK,), repeats=1, head="tied")


@pytest.fixture(autouse=True)
def standard():
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  """Sixty of the pairs that ship, each text cut to 24 letters."""
  file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
  found = files.read_jsonl(files.path("jaxlm://corpora/preferences.jsonl.gz"))
  rows = [
    {key: row[key][0]["content"][:24] for key in ("prompt", "chosen", "rejected")}
    for _, (_, row) in zip(range(60), found, strict=False)
  ]
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(file)


@pytest.fixture(scope="module")
def dpo(pairs, tmp_path_factory):
  """Makes the run; the cache is shared."""
  cache = str(tmp_path_factory.mktemp("cache"))

  def make(**fields):
    defaults = {
      "model": MODEL,
      "data": Data(
        sources=(Weighted(source=Preferences(path=pairs)),),
        tokenizer=Bytes(),
        seq_len=128,
        batch=8,
        held_out=0.2,
        cache=cache,
      ),
      "objective": Preference(),
      "optimizer": AdamW(lr=Constant(peak=3e-3)),
      "steps": STEPS,
      "evaluate_every": 4,
      "log_every": 1,
      "checkpoints": Checkpoints(every=3, keep=9),
      "samples": Samples(prompts=()),
    }
    return Train(**(defaults | fields))

  return make


@pytest.fixture(scope="module")
def whole(dpo, tmp_path_factory):
  """The run without interruption."""
  with jax.numpy_dtype_promotion("standard"):
    return dpo().run(tmp_path_factory.mktemp("whole") / "w")


def steady(rows):
  """Metrics without times."""
  return [{n: v for n, v in row.items() if n not in TIMES} for row in rows]


def test_the_first_loss_is_that_of_no_preference_and_margins_rise(whole):
  losses = [row["loss"] for row in whole.rows if "loss" in row]
  assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
  scores = [row for row in whole.rows if "held_out/margin" in row]
  assert [row["step"] for row in scores] == [4, 8]
  assert scores[0]["held_out/margin"] < scores[1]["held_out/margin"]
  assert min(losses[4:]) < 0.66


def test_resume_in_the_middle_is_exact_to_the_bit(dpo, whole, copy, capsys):
  place = copy(whole.workdir, newest=3)
  again = dpo().run(place)
  assert "going on from the checkpoint of step 3" in capsys.readouterr().out
  assert again.step == STEPS
  ours = hooks.leaves_of(place / "checkpoints" / f"{STEPS:08d}")
  theirs = hooks.leaves_of(whole.workdir / "checkpoints" / f"{STEPS:08d}")
  assert ours.keys() == theirs.keys()
  for name, leaf in theirs.items():
    np.testing.assert_array_equal(ours[name], leaf, strict=True, err_msg=name)
  trained = [row for row in steady(again.rows) if "loss" in row]
  assert trained == [row for row in steady(whole.rows) if "loss" in row]


def test_a_pair_is_never_scored_twice(dpo, whole, tmp_path, capsys):
  dpo(steps=1).run(tmp_path / "other")
  out = capsys.readouterr().out
  assert "log-probabilities found in" in out
  assert "finished: step 1 in" in out
  assert "Held-out loss: 0." in out
  assert (tmp_path / "other" / RECORD).exists()


def test_a_resumed_run_whose_first_weights_are_gone_is_refused(dpo, whole, copy):
  place = copy(whole.workdir, newest=3)
  (place / RECORD).write_text(json.dumps({"weights": "0" * 32}))
  with pytest.raises(InputError, match=r"reference.json: this run's reference"):
    dpo().run(place)


def test_other_weights_are_scored_anew_and_leave_nothing_behind(
  dpo, whole, tmp_path, capsys
):
  """Stopped after the pass over the data, before a step: its record counts nothing."""
  workdir = tmp_path / "w"
  dpo(steps=1, seed=7).run(workdir)
  assert "reference: scoring" in capsys.readouterr().out
  record = (workdir / RECORD).read_text()
  shutil.rmtree(workdir / "checkpoints")
  (workdir / "metrics.jsonl").write_text("")
  again = dpo().run(workdir)
  assert (workdir / RECORD).read_text() != record
  first = next(row["loss"] for row in again.rows if "loss" in row)
  assert first == pytest.approx(np.log(2), abs=1e-6)


@pytest.fixture
def own(dpo, whole, tmp_path):
  """(the run with a copy of the cache, the copy)."""
  data = dpo().data
  place = shutil.copytree(data.cache, tmp_path / "own")
  return dpo(data=dataclasses.replace(data, cache=str(place))), place


def test_files_that_are_gone_are_made_again_on_resuming(own, whole, copy, capsys):
  run, cache = own
  gone = list(cache.glob("*/*reference-*"))
  assert gone
  for file in gone:
    file.unlink()
  again = run.run(copy(whole.workdir, newest=3))
  assert "reference: scoring" in capsys.readouterr().out
  trained = [row for row in steady(again.rows) if "loss" in row]
  assert trained == [row for row in steady(whole.rows) if "loss" in row]


def test_a_damaged_file_is_refused(own, whole, copy):
  run, cache = own
  key = json.loads((whole.workdir / RECORD).read_text())["weights"]
  (file,) = cache.glob(f"*/0.train.reference-{key}*.npy")
  data = bytearray(file.read_bytes())
  data[-1000] ^= 1
  file.write_bytes(data)
  with pytest.raises(InputError, match=r"reference of 0.train in .* is damaged"):
    run.run(copy(whole.workdir, newest=3))


def test_the_fingerprint_is_of_values_and_not_of_layouts():
  def made(mesh, devices, change=None):
    layout = Layout(make_mesh(mesh, devices))
    decoder = Decoder(MODEL, Precision(), layout)
    params = unbox(init(decoder, jax.random.key(0)))
    if change is not None:
      params["embed"]["table"] = change(params["embed"]["table"])
    return reference.fingerprint(decoder, params)

  one = made(Mesh(), jax.devices()[:1])
  assert made(Mesh(fsdp=4, tensor=2), None) == one
  changes = {
    "one bit": lambda t: t.at[7, 3].multiply(1 + 2**-23),
    "two signs": lambda t: t.at[7, 3].multiply(-1).at[9, 4].multiply(-1),
    "two rows swapped": lambda t: t.at[7].set(t[8]).at[8].set(t[7]),
  }
  found = {name: made(Mesh(), jax.devices()[:1], fn) for name, fn in changes.items()}
  assert len({one, *found.values()}) == 4


def test_an_objective_must_go_with_its_data(dpo):
  with pytest.raises(InputError, match="Preferences is not what objective=NextToken"):
    dpo(objective=NextToken())
  margins = Reward(loss=BradleyTerry(margin=True))
  with pytest.raises(InputError, match=r"data.sources.0.source.margins: false, but"):
    dpo(objective=margins, model=dataclasses.replace(MODEL, scores=1))
  loss = dataclasses.replace(Preference().loss, losses=(("aot", 1.0),))
  with pytest.raises(InputError, match="accumulate: 2, but aot sorts all pairs"):
    dpo(objective=Preference(loss=loss), accumulate=2)
