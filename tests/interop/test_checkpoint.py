import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from interop.goldens import (
  FOLDER,
  assert_same_leaves,
  export,
  loaded,
  opened,
  read,
)
from jaxlm.errors import InputError
from jaxlm.interop import checkpoint, own, stream
from jaxlm.interop.checkpoint import Exported, open_model
from jaxlm.trees import named_leaves

KINDS = ["hf", "gguf", "jaxlm"]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def place(tmp_path):
  return epath.Path(tmp_path)


def write(target, kind, params, family="llama", tell=lambda done: None):
  family = opened("llama").family if family else None
  Exported(opened("llama").model, family, params, None).write(
    target, kind, "float32", tell
  )


@pytest.mark.parametrize("first", KINDS)
@every_kind
def test_every_kind_can_be_made_of_every_other(first, kind, place):
  one = export("llama-3.1", place / "one", first)
  params = read(one)
  opened_one = open_model(one)
  assert opened_one.kind == first
  wanted = Exported(opened_one.model, opened_one.family, params, None)
  wanted.write(place / "two", kind, "float32", lambda done: None)
  assert open_model(place / "two").kind == kind
  assert open_model(place / "two").model == opened("llama-3.1").model
  assert_same_leaves(read(place / "two"), loaded("llama-3.1"))


@every_kind
def test_elements_are_told(kind, place):
  told = []
  write(place / "out", kind, loaded("llama"), tell=told.append)
  every = sum(leaf.size for leaf in jax.tree.leaves(loaded("llama")))
  assert sum(told) == every


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_a_family_is_found_where_none_is_given(kind, place):
  write(place / "out", kind, loaded("llama"), family=None)
  assert open_model(place / "out").family.name == "llama"


def test_nothing_to_open_is_told_with_its_field(place):
  message = f"^generate.model: {place}/none does not exist. Give a Hugging Face folder"
  with pytest.raises(InputError, match=message):
    open_model(place / "none", "generate.model")


def test_a_folder_of_something_else_is_told(place):
  with pytest.raises(InputError, match=rf"{place}/config\.json: does not exist"):
    open_model(place)


@every_kind
def test_a_target_that_exists_is_not_touched(kind, place):
  (place / "file").write_text("kept")
  (place / "folder").mkdir()
  for name in ("file", "folder"):
    with pytest.raises(InputError, match=f"^{place}/{name}: exists and is not overwr"):
      write(place / name, kind, loaded("llama"))
  assert (place / "file").read_text() == "kept"
  assert [file.name for file in place.iterdir() if file.name.startswith(".")] == []
  assert list((place / "folder").iterdir()) == []


@every_kind
def test_folders_above_the_target_are_made(kind, place):
  write(place / "a" / "b" / "out", kind, loaded("llama"))
  assert [file.name for file in (place / "a" / "b").iterdir()] == ["out"]


def nan():
  """Returns the parameters with one value in the last leaf that is none."""
  leaves = named_leaves(loaded("llama"))
  name = "layers/0/mlp/down"
  leaves[name] = leaves[name].at[-1, -1, -1].set(jnp.nan)
  return jax.tree.unflatten(jax.tree.structure(loaded("llama")), leaves.values())


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_a_value_that_is_not_finite_leaves_nothing(kind, place):
  with pytest.raises(InputError, match=r"1.*has a value that is not finite as float32"):
    write(place / "out", kind, nan())
  assert list(place.iterdir()) == []


class OtherError(Exception):
  pass


@pytest.mark.parametrize("kind", ["hf", "gguf"])
@pytest.mark.parametrize("count", [1, 7, 21])
def test_a_failure_at_any_tensor_leaves_nothing(kind, count, place, monkeypatch):
  true, calls = stream.tensor_of, []

  def failing(entry, leaves, dtype):
    if entry.name not in calls:
      calls.append(entry.name)
    if len(calls) == count:
      raise OtherError
    return true(entry, leaves, dtype)

  monkeypatch.setattr(stream, "tensor_of", failing)
  with pytest.raises(OtherError):
    write(place / "out", kind, loaded("llama"))
  assert list(place.iterdir()) == []


@pytest.mark.parametrize("step", ["save", "seal"])
def test_a_failure_of_our_own_folder_leaves_nothing(step, place, monkeypatch):
  def failing(folder, *rest):
    raise OtherError

  monkeypatch.setattr(own, step, failing)
  with pytest.raises(OtherError):
    write(place / "out", "jaxlm", loaded("llama"))
  assert list(place.iterdir()) == []


@every_kind
def test_a_target_that_another_process_made_meanwhile_is_kept(kind, place, monkeypatch):
  true = checkpoint.uuid.uuid4

  def made_meanwhile():
    (place / "out").write_text("theirs")
    return true()

  monkeypatch.setattr(checkpoint.uuid, "uuid4", made_meanwhile)
  with pytest.raises(InputError, match="exists; another process has made it meanwhile"):
    write(place / "out", kind, loaded("llama"))
  assert [file.name for file in place.iterdir()] == ["out"]
  assert (place / "out").read_text() == "theirs"


KILLED = """
import os, signal, sys
from etils import epath
from jaxlm.interop import own
from jaxlm.interop.checkpoint import Exported, open_model
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import Precision
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout
import jax

source, target, kind = sys.argv[1:]
opened = open_model(source)
layout = Layout(make_mesh(Mesh(), jax.devices()[:1]))
params = opened.params(Decoder(opened.model, Precision(), layout))
left = [5]

def die(*ignored):
  left[0] -= 1
  if left[0] == 0 or kind == "jaxlm":
    os.kill(os.getpid(), signal.SIGKILL)

own.seal = die
Exported(opened.model, opened.family, params, None).write(
  epath.Path(target), kind, "float32", die
)
"""


def test_what_was_killed_does_not_look_whole(place):
  reasons = {
    "hf": r"config\.json: does not exist",
    "jaxlm": r"has no manifest\.json, so it was not written to its end",
  }
  begun = {
    kind: subprocess.Popen(
      [sys.executable, "-c", KILLED, FOLDER / "llama", place / kind, kind]
    )
    for kind in reasons
  }
  for kind, process in begun.items():
    assert process.wait() == -signal.SIGKILL
    assert not (place / kind).exists()
  # What lies beside it has another name, and is refused under that too.
  left = {file.name.split(".")[1]: file for file in place.iterdir()}
  assert set(left) == set(reasons)
  for kind, reason in reasons.items():
    with pytest.raises(InputError, match=reason):
      read(left[kind])
  # And the same command goes through.
  write(place / "hf", "hf", loaded("llama"))
  assert_same_leaves(read(place / "hf"), loaded("llama"))
