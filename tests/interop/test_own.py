import dataclasses
import json
import shutil

import pytest
from etils import epath
from models.specs import alone

from interop.goldens import (
  CASES,
  assert_same_leaves,
  export,
  loaded,
  opened,
  read,
)
from jaxlm.errors import InputError
from jaxlm.interop import own
from jaxlm.interop.checkpoint import Exported, open_model
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import Precision
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout, ShardingRules
from jaxlm.trees import named_leaves


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_read_again(name, tmp_path):
  folder = export(name, tmp_path / "out", "jaxlm")
  one = open_model(folder)
  assert (one.kind, one.model, one.dtype) == ("jaxlm", opened(name).model, "float32")
  assert one.family is opened(name).family
  assert_same_leaves(read(folder), loaded(name))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  return export("qwen3", tmp_path_factory.mktemp("own") / "out", "jaxlm")


@pytest.fixture
def folder(written, tmp_path):
  shutil.copytree(written, tmp_path / "out")
  return epath.Path(tmp_path / "out")


def test_the_largest_difference_is_found(written):
  params = read(written)
  assert open_model(written).largest_difference(params) == 0
  leaf = params["layers"]["0"]["mixer"]["q"]
  params["layers"]["0"]["mixer"]["q"] = leaf.at[1, 2, 3, 4].add(0.5)
  assert open_model(written).largest_difference(params) == pytest.approx(0.5, rel=1e-5)


def test_a_folder_is_read_onto_another_layout(written):
  layout = Layout(make_mesh(Mesh(fsdp=4, tensor=2)), ShardingRules(vocab=()))
  made = Decoder(opened("qwen3").model, Precision(), layout)
  params = open_model(written).params(made)
  assert_same_leaves(params, loaded("qwen3"))
  leaf = named_leaves(params)["layers/0/mixer/q"]
  assert leaf.sharding == layout.sharding("layers", "embed", "heads", "head_dim")
  assert leaf.addressable_shards[0].data.shape == (2, 8, 2, 16)


def test_a_model_without_a_family_keeps_none(tmp_path):
  one = Exported(opened("qwen3").model, None, loaded("qwen3"), None)
  one.write(epath.Path(tmp_path / "out"), "jaxlm", "float32", lambda done: None)
  assert open_model(tmp_path / "out").family is None
  assert_same_leaves(read(tmp_path / "out"), loaded("qwen3"))


def refused(folder, message):
  with pytest.raises(InputError, match=f"^{folder}{message}"):
    read(folder)


def test_a_flipped_byte_is_noticed(folder):
  places = folder.glob("arrays/params/ocdbt.process_0/d/*")
  file = max(places, key=lambda place: place.stat().length)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(bytes(data))
  refused(folder, f": holds no whole checkpoint; .*{file.name} has other bytes")


def test_a_missing_file_is_noticed(folder):
  next(iter(folder.glob("arrays/params/ocdbt.process_0/d/*"))).unlink()
  refused(folder, ": holds no whole checkpoint; .* is missing")


def test_a_folder_without_a_manifest_is_not_whole(folder):
  (folder / "manifest.json").unlink()
  refused(folder, r": has no manifest\.json, so it was not written to its end")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}'])
def test_a_description_that_is_none_is_refused(text, folder):
  (folder / own.MODEL).write_text(text)
  refused(folder, r"/model\.json: not a model's description")


def test_a_description_of_another_model_is_refused(written):
  other = dataclasses.replace(opened("qwen3").model, vocab=62)
  one = dataclasses.replace(open_model(written), model=other)
  with pytest.raises(InputError, match=r"another model. Parameter 'embed/table' is"):
    one.params(Decoder(other, Precision(), alone()))


def test_a_description_of_before_a_field_was_added_takes_its_default(folder):
  text = (folder / "model.json").read_text()
  data = json.loads(text)
  before = own.describe(folder)
  assert data["model"].pop("logit_scale") == 1.0
  (folder / "model.json").write_text(json.dumps(data))
  assert own.describe(folder) == before
