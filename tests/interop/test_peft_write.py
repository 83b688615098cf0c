"""Adapters into PEFT's folders: what was read from them, written, is the same."""

import json
import pathlib

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from interop.test_peft_read import FOLDERS, GOLDENS, METHODS, side
from jaxlm.errors import InputError
from jaxlm.interop import peft_read, peft_write
from jaxlm.interop.checkpoint import open_model
from jaxlm.interop.peft_modules import Folder
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import Precision
from jaxlm.peft import methods
from jaxlm.peft.lora import LoRA
from jaxlm.peft.part import Part
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout

__all__ = ["side"]
SAME = (
  "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias",
  "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "task_type",
  "num_transformer_submodules", "prefix_projection",
)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_tensors_and_config_are_those_that_peft_wrote(method, side, tmp_path):
  decoder, family, *_ = side
  places = (tmp_path / "x", FOLDERS / method)
  found = peft_read.read(epath.Path(places[1]), decoder, family)
  peft_write.write(epath.Path(places[0]), found, decoder, family)
  ours, theirs = (load_file(place / peft_read.WEIGHTS) for place in places)
  assert ours.keys() == theirs.keys()
  for name, array in theirs.items():
    np.testing.assert_array_equal(ours[name], array, strict=True, err_msg=name)
  ours, theirs = (
    json.loads((place / peft_read.CONFIG).read_text()) for place in places
  )
  # Which rank and alpha is called the common one is free where there are several.
  free = {"r", "lora_alpha"} if method == "ranks" else set()
  for key in (set(SAME) & ours.keys()) - free:
    assert ours[key] == theirs[key], key
  again = peft_read.read(epath.Path(places[0]), decoder, family)
  assert again.spec == found.spec


def test_modules_are_told_apart_by_whole_names(side, tmp_path):
  """Where a last name alone would take more than has adapters."""
  opened = open_model(GOLDENS / "checkpoints/llama")
  decoder = side[0]
  wide = LoRA(rank=2, targets=("mixer/q$",))
  trained = methods.build(wide, (), decoder).init(side[2], jax.random.key(0))
  folder = Folder(wide, trained, "x")
  peft_write.write(epath.Path(tmp_path / "a"), folder, decoder, opened.family)
  told = json.loads((tmp_path / "a" / peft_read.CONFIG).read_text())
  assert told["target_modules"] == ["q_proj"]


def test_what_peft_has_no_place_for(side, tmp_path):
  decoder, family, base, _ = side
  for spec in (Part(), LoRA(start="pissa")):
    trained = methods.build(spec, (), decoder).init(base, jax.random.key(0))
    folder = Folder(spec, trained, "x")
    with pytest.raises(InputError, match="PEFT's folders have no place for"):
      peft_write.write(epath.Path(tmp_path / "x"), folder, decoder, family)
  assert not (tmp_path / "x").exists()


def test_a_module_of_several_matrices_is_refused(tmp_path):
  opened = open_model(GOLDENS / "checkpoints/phi3")
  layout = Layout(make_mesh(Mesh(), jax.devices()[:1]))
  decoder = Decoder(opened.model, Precision(), layout)
  spec, base = LoRA(rank=2), opened.params(decoder)
  trained = methods.build(spec, (), decoder).init(base, jax.random.key(0))
  folder = Folder(spec, trained, "x")
  with pytest.raises(InputError, match=r"qkv_proj.weight: one module there and"):
    peft_write.write(epath.Path(tmp_path / "x"), folder, decoder, opened.family)


def test_nothing_is_overwritten(side, tmp_path):
  decoder, family, *_ = side
  found = peft_read.read(epath.Path(FOLDERS / "lora"), decoder, family)
  pathlib.Path(tmp_path / "x").mkdir()
  with pytest.raises(InputError, match="exists and is not overwritten"):
    peft_write.write(epath.Path(tmp_path / "x"), found, decoder, family)
