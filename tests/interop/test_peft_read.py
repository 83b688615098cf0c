"""PEFT's own folders, read: its logits, and what cannot be read."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from jaxlm.errors import InputError
from jaxlm.interop import peft_read
from jaxlm.interop.checkpoint import open_model
from jaxlm.models.decoder import Decoder, logits
from jaxlm.models.spec import Precision
from jaxlm.peft import methods
from jaxlm.peft.lora import LoRA
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
FOLDERS, LLAMA = GOLDENS / "peft_folders", GOLDENS / "checkpoints/llama"
METHODS = sorted(place.name for place in FOLDERS.iterdir())


@pytest.fixture(scope="module")
def side():
  """The decoder, its family, its parameters, and what gives logits."""
  opened = open_model(LLAMA)
  layout = Layout(make_mesh(Mesh(), jax.devices()[:1]))
  decoder = Decoder(opened.model, Precision(), layout)
  ids = np.random.default_rng(0).integers(0, opened.model.vocab, (2, 24))

  def run(params):
    x_BTD, _ = decoder.apply({"params": params}, jnp.asarray(ids))
    return logits(opened.model, params, x_BTD)

  return decoder, opened.family, opened.params(decoder), jax.jit(run)


def test_all_kinds_are_here():
  assert METHODS == ["dora", "ia3", "lora", "prefix", "prompt", "ranks", "rslora"]


@pytest.mark.parametrize("method", METHODS)
def test_logits_are_peft_s(method, side):
  """Made by experiments/adapters/peft_roundtrip.py with PEFT 0.21.2."""
  decoder, family, base, run = side
  found = peft_read.read(epath.Path(FOLDERS / method), decoder, family)
  attach = methods.build(found.spec, (), decoder).attach
  wanted = np.load(FOLDERS / method / "logits.npy")
  params = jax.jit(attach)(base, found.trained, None)
  assert float(np.abs(run(base) - wanted).max()) > 0.01
  np.testing.assert_allclose(run(params), wanted, atol=2e-5)


@pytest.mark.parametrize("method", ["dora", "ia3", "prompt"])
def test_a_folder_opens_as_the_model_with_its_adapters(method, side):
  decoder, _, _, run = side
  opened = open_model(FOLDERS / method)
  assert opened.kind == "peft"
  wanted = np.load(FOLDERS / method / "logits.npy")
  np.testing.assert_allclose(run(opened.params(decoder)), wanted, atol=2e-5)


def test_what_the_config_says_is_in_the_spec(side):
  decoder, family, *_ = side
  spec = peft_read.read(epath.Path(FOLDERS / "ranks"), decoder, family).spec
  assert isinstance(spec, LoRA)
  name = "layers/0/{}".format
  assert spec.rank_of(name("mlp/up")) == 6
  assert spec.rank_of(name("mlp/gate")) == 4
  assert spec.scale_of(name("mixer/q")) == 24 / 4
  assert spec.scale_of(name("mlp/up")) == 8 / 6


@pytest.fixture
def changed(tmp_path, side):
  """Reads a copy of a folder with other entries in its config or its tensors."""

  def read(method, config, tensors=lambda t: t):
    place = tmp_path / method
    shutil.copytree(FOLDERS / method, place)
    file = place / peft_read.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    weights = place / peft_read.WEIGHTS
    save_file(tensors(load_file(weights)), weights)
    return peft_read.read(epath.Path(place), side[0], side[1])

  return read


def without(word):
  return lambda tensors: {n: a for n, a in tensors.items() if word not in n}


@pytest.mark.parametrize(
  ("method", "config", "tensors", "told"),
  [
    ("lora", {"peft_type": "OFT"}, None, r"peft_type='OFT'; read are LORA, IA3"),
    ("lora", {"modules_to_save": ["lm_head"]}, None, r"modules_to_save=\['lm_head'\]"),
    ("lora", {"bias": "all"}, None, r"bias='all' is not read; only 'none' is"),
    ("lora", {"init_lora_weights": "pissa"}, None, r"PEFT has changed"),
    ("lora", {"init_lora_weights": "lora_ga"}, None, r"'lora_ga': such adapters may"),
    ("lora", {"alora_invocation_tokens": [1]}, None, r"alora_invocation_tokens=\[1\]"),
    ("lora", {}, lambda t: {n: a[:, :-1] for n, a in t.items()}, "for another model"),
    ("lora", {}, without("layers.1."), r"of one rank; missing are \[1\]"),
    ("lora", {}, without("lora_B"), r"has no tensor lora_B.weight"),
    ("prefix", {"prefix_projection": True}, None, "prefix_projection=True is not read"),
    ("prefix", {}, lambda t: {n: a[:, :-8] for n, a in t.items()}, "needs 128"),
    ("prompt", {}, lambda t: {n: a[:, :-8] for n, a in t.items()}, "24 dims for a"),
    ("prompt", {}, lambda t: {"x" + n: a for n, a in t.items()}, "missing beside it"),
    (
      "lora",
      {},
      lambda t: t | {"base_model.model.x.lora_A.weight": np.zeros((4, 4), np.float32)},
      r"'base_model.model.x.lora_A.weight' is not known",
    ),
  ],
)
def test_what_is_not_read_is_named(method, config, tensors, told, changed):
  with pytest.raises(InputError, match=told):
    changed(method, config, tensors or (lambda t: t))


def test_a_base_that_is_not_here_is_named(tmp_path):
  shutil.copytree(FOLDERS / "lora", tmp_path / "x")
  with pytest.raises(InputError, match=r"base_model_name_or_path='../../checkpoints"):
    open_model(tmp_path / "x")


@pytest.mark.parametrize(
  ("file", "text", "told"),
  [
    ("adapter_config.json", "[]", "not a JSON object"),
    ("adapter_config.json", "{", "not JSON"),
    ("adapter_config.json", '{"peft_type": "LORA"}', "base_model_name_or_path=''"),
    (
      "adapter_config.json",
      '{"base_model_name_or_path": "."}',
      r"base_model_name_or_path='\.' is no folder here",
    ),
  ],
)
def test_a_damaged_folder_is_named(file, text, told, tmp_path):
  shutil.copytree(FOLDERS / "lora", tmp_path / "x")
  (tmp_path / "x" / file).write_text(text)
  with pytest.raises(InputError, match=told):
    open_model(tmp_path / "x")


def test_tensors_that_are_cut_short_are_named(side, tmp_path):
  place = tmp_path / "x"
  shutil.copytree(FOLDERS / "lora", place)
  weights = place / peft_read.WEIGHTS
  weights.write_bytes(weights.read_bytes()[:-9])
  with pytest.raises(InputError, match=r"adapter_model.safetensors: cannot be read"):
    peft_read.read(epath.Path(place), side[0], side[1])
