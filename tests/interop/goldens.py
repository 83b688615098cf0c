"""The golden checkpoints: opened, loaded and run, each once."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from models.specs import decoder
from safetensors.numpy import load_file, save_file

from jaxlm.interop.checkpoint import Exported, open_model
from jaxlm.models.decoder import logits
from jaxlm.trees import named_leaves

FOLDER = epath.Path(__file__).parents[1] / "goldens/checkpoints"
CASES = sorted(folder.name for folder in FOLDER.iterdir())
# Of the largest |logit|. At most 1.3e-6 was seen; 1e-4 is what is promised.
GATE = 1e-5


@functools.cache
def opened(name):
  return open_model(FOLDER / name)


@functools.cache
def loaded(name):
  return opened(name).params(decoder(opened(name).model))


@functools.cache
def golden(name, file="golden.npz"):
  """Returns tokens [2, T] and what transformers makes of them, [2, T, V]."""
  arrays = np.load(FOLDER / name / file)
  return jnp.asarray(arrays["tokens"]), arrays["logits"]


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, tokens):
  """Returns the logits of a model."""
  return logits(model, params, decoder(model).apply({"params": params}, tokens)[0])


def distance(found, wanted):
  """Returns the largest |difference| as a share of the largest |logit|."""
  return np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max()


def short(model):
  """Returns the model as it is used in contexts that fit the original length."""

  def change(block):
    positions = block.mixer.positions
    scaling = positions.scaling
    scaling = dataclasses.replace(scaling, length=scaling.original_length)
    positions = dataclasses.replace(positions, scaling=scaling)
    mixer = dataclasses.replace(block.mixer, positions=positions)
    return dataclasses.replace(block, mixer=mixer)

  return dataclasses.replace(model, pattern=tuple(map(change, model.pattern)))


def export(name, target, kind, dtype="float32"):
  """Writes a case in some format, without a tokenizer."""
  one = opened(name)
  wanted = Exported(one.model, one.family, loaded(name), None)
  wanted.write(epath.Path(target), kind, dtype, lambda done: None)
  return epath.Path(target)


def assert_same_leaves(tree, other):
  """Compares names, dtypes and every bit."""
  leaves, others = named_leaves(tree), named_leaves(other)
  assert list(leaves) == list(others)
  for name, leaf in leaves.items():
    assert leaf.dtype == others[name].dtype, name
    assert np.array_equal(np.asarray(leaf), np.asarray(others[name])), name


def copied(name, folder):
  """Copies the checkpoint of a case; returns the copy."""
  epath.Path(folder).mkdir(exist_ok=True)
  for file in (FOLDER / name).iterdir():
    if file.name.startswith(("config.json", "model")):
      shutil.copy(file, folder)
  return epath.Path(folder)


def edit(folder, change):
  """Changes the tensors of a folder, {name: array}, in place."""
  file = folder / "model.safetensors"
  tensors = load_file(file)
  change(tensors)
  save_file(tensors, file)


def edit_config(folder, **changes):
  values = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(values | changes))


def read(place):
  """Opens and loads whatever is there."""
  one = open_model(place)
  return one.params(decoder(one.model))
