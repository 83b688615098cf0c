import json

import jax
import numpy as np
import pytest
from models.specs import decoder

from jaxlm import config
from jaxlm.data.pretrained import Pretrained
from jaxlm.errors import InputError
from jaxlm.interop.checkpoint import open_model
from jaxlm.runs.convert import Convert
from runs import pretrained


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  """The same model in each form."""
  folder = tmp_path_factory.mktemp("initial")
  params = pretrained.write(folder / "hf")
  Convert(source=str(folder / "hf"), target=str(folder / "own")).run()
  gguf = Convert(source=str(folder / "hf"), target=str(folder / "x.gguf"))
  config.override(gguf, ["dtype=float32"]).run()
  return folder, jax.tree.leaves(params)


def finetune(place, text, *overrides):
  cfg = config.load(
    f"configs/finetune.py:model={place},text={text},seq_len=32,batch=8,steps=3"
  )
  small = ["samples.prompts=()", "log_every=1", "data.held_out=0.2"]
  return config.override(cfg, [*small, *overrides])


@pytest.fixture(scope="module")
def whole(places, text, tmp_path_factory):
  """A run without interruption from the Hugging Face folder."""
  run = finetune(places[0] / "hf", text, "checkpoints.every=2")
  with jax.numpy_dtype_promotion("standard"):
    return run.run(tmp_path_factory.mktemp("whole") / "w")


@pytest.mark.parametrize("form", ["hf", "own", "x.gguf"])
def test_a_run_starts_from_the_weights_and_the_tokenizer(
  places, text, tmp_path, form, capsys
):
  folder, params = places
  cfg = finetune(folder / form, text, "optimizer.lr=Constant(peak=1e-30,warmup=0)")
  result = cfg.run(tmp_path)
  assert pretrained.equal(jax.tree.leaves(result.params), params)
  source = open_model(folder / form).tokenizer()
  sample = "The king <|im_end|> is here"
  assert result.tokenizer.encode(sample) == source.encode(sample)
  assert f"starting from {folder / form}" in capsys.readouterr().out
  scores = [r for r in result.rows if "held_out/bits_per_byte" in r]
  assert [row["step"] for row in scores] == [0, 3]
  assert scores[0]["held_out/nll"] == scores[1]["held_out/nll"]


def test_training_goes_on_and_resumes(places, text, whole, copy):
  """A run that is stopped and resumed ends where one that is not ends."""
  folder, params = places
  assert not pretrained.equal(jax.tree.leaves(whole.params), params)
  scores = [r["held_out/nll"] for r in whole.rows if "held_out/nll" in r]
  assert scores[1] < scores[0]
  place = copy(whole.workdir, newest=2)
  again = finetune(folder / "hf", text, "checkpoints.every=2").run(place)
  assert pretrained.equal(jax.tree.leaves(again.params), jax.tree.leaves(whole.params))
  rows = (place / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(row)["step"] for row in rows].count(0) == 1


def test_a_run_is_a_pretrained_model_too(whole, tmp_path):
  opened = open_model(whole.workdir)
  found = jax.tree.leaves(opened.params(decoder(opened.model)))
  assert pretrained.equal(found, jax.tree.leaves(whole.params))
  target = tmp_path / "hf"
  report = Convert(source=str(whole.workdir), target=str(target)).run()
  assert report["largest difference after a round trip"] == 0.0
  back = open_model(target)
  assert back.model == pretrained.MODEL
  assert back.tokenizer().encode("the king") == whole.tokenizer.encode("the king")


def test_the_average_is_used_where_a_run_keeps_one(places, text, tmp_path, capsys):
  folder, _ = places
  run = finetune(folder / "hf", text, "ema=0.5")
  result = run.run(tmp_path / "run")
  capsys.readouterr()
  opened = open_model(tmp_path / "run")
  found = jax.tree.leaves(opened.params(decoder(opened.model)))
  assert pretrained.equal(found, jax.tree.leaves(result.params))
  assert "the average of the parameters is used" in capsys.readouterr().out


def test_what_has_no_parameters_may_change_and_is_told(places, text, tmp_path, capsys):
  folder, _ = places
  cfg = finetune(
    folder / "hf", text, "model.pattern.0.mixer.window=8", "model.context=none"
  )
  cfg.run(tmp_path)
  out = capsys.readouterr().out
  assert "changed from it: block.mixer.window: None -> 8" in out
  assert "changed from it: context: 128 -> None" in out


def test_another_model_is_refused_by_the_tensor(places, text, tmp_path):
  folder, _ = places
  cfg = finetune(folder / "hf", text, "model.pattern.0.mlp.hidden=64")
  with pytest.raises(InputError, match=r"initial: .*mlp\.gate_proj.* \(48, 32\)"):
    cfg.run(tmp_path)
  cfg = finetune(folder / "own", text, "model.pattern.0.mlp.hidden=64")
  with pytest.raises(InputError, match=r"initial: .*another model"):
    cfg.run(tmp_path / "own")


def test_a_model_that_is_not_there(text, tmp_path):
  with pytest.raises(InputError, match=r"does not exist\. Give a Hugging Face folder"):
    finetune(tmp_path / "absent", text)


def test_the_same_rows_whatever_the_file(places, text, whole, tmp_path):
  """The packed rows come from the tokenizer and not from where it was kept."""
  folder, _ = places
  runs = [finetune(folder / form, text) for form in ("hf", "x.gguf")]
  assert all(isinstance(run.data.tokenizer, Pretrained) for run in runs)
  results = (whole, runs[1].run(tmp_path / "gguf"))
  losses = [[r["loss"] for r in result.rows if "loss" in r] for result in results]
  assert len(losses[0]) == 3
  np.testing.assert_array_equal(*losses)
