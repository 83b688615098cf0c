"""Every file in configs/: loaded, saved, explained, and shape-checked, not computed."""

import re
from pathlib import Path

import jax
import pytest

from jaxlm import config, explain
from jaxlm.runs.assembled import assemble
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout

FILES = sorted(Path(__file__).parents[1].joinpath("configs").glob("*.py"))
MODEL = Path(__file__).with_name("goldens") / "checkpoints/llama"
# What the files need; what is not here needs nothing.
ARGUMENTS = {
  "chat": f"model={MODEL}",
  "convert": f"source={MODEL},target=x",
  "finetune": f"model={MODEL}",
  "generate": f"model={MODEL},prompts=x.txt,out=x.jsonl",
  "score": f"model={MODEL},data=x.jsonl,out=y.jsonl",
  "sft": f"model={MODEL}",
  "distill": f"teacher={MODEL}",
  "dpo": f"model={MODEL},method=mpo",
  "kto": f"model={MODEL}",
  "lora": f"model={MODEL},objective=reward",
  "reward_model": f"model={MODEL}",
}
UNTRAINED = ("budget", "chat", "convert", "decode", "generate", "score")
TRAINED = [file for file in FILES if file.stem not in UNTRAINED]
CONFIGS = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def load(file):
  given = ARGUMENTS.get(file.stem)
  return config.load(str(file) if given is None else f"{file}:{given}")


def test_there_are_configs():
  assert "quickstart" in {file.stem for file in FILES}


@CONFIGS
def test_it_is_saved_and_loaded_into_an_equal_object(file):
  cfg = load(file)
  config.check(cfg)
  assert config.from_json(config.to_json(cfg)) == cfg
  assert hasattr(cfg, "run")


def undocumented(value, at=""):
  """Yields the fields of a config that have no doc in their class."""
  if isinstance(value, tuple):
    for index, element in enumerate(value):
      yield from undocumented(element, explain.join(at, index))
  if not explain.is_config(value):
    return
  docs = {}
  for base in type(value).__mro__:
    docs = explain._class_docs(base)[1] | docs
  for name in explain.field_types(type(value)):
    if not docs.get(name):
      yield explain.join(at, name)
    yield from undocumented(getattr(value, name), explain.join(at, name))


@CONFIGS
def test_every_field_is_explained(file):
  cfg = load(file)
  assert list(undocumented(cfg)) == []
  text = config.explain(cfg)
  parts = [f"{name} = " for name in explain.field_types(type(cfg))]
  if file in TRAINED:
    parts = ["model.dim = ", "data.batch = ", "optimizer.lr.peak = ", "steps = "]
  for part in parts:
    assert part in text


@CONFIGS
def test_its_docstring_says_what_it_is(file):
  assert re.match(r'""".+?\."""|""".+?\.\n', file.read_text(), re.DOTALL)


@pytest.mark.parametrize("file", TRAINED, ids=lambda file: file.stem)
def test_state_and_step_have_the_right_shapes(file):
  """Abstract values alone, on a mesh of one device."""
  cfg = load(file)
  layout = Layout(make_mesh(Mesh(), jax.devices()[:1]), cfg.sharding)
  with jax.numpy_dtype_promotion("standard"):
    parts = assemble(cfg, layout)
    plan = parts.plan
    after, metrics = jax.eval_shape(parts.step, plan.shapes, parts.batch)
  facts = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
  assert facts(after) == facts(plan.shapes)
  assert {"loss", "grad_norm", "lr"} <= metrics.keys()
  assert {(x.shape, str(x.dtype)) for x in metrics.values()} == {((), "float32")}
