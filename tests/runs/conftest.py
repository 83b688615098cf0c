"""A tiny run on a slice of the real corpus."""

import gzip
import json
import pathlib
import shutil

import jax
import pytest

from jaxlm import config, files

TINY = pathlib.Path(__file__).with_name("tiny.py")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
  """The path of 25 documents, 3 kB of a scene each."""
  file = tmp_path_factory.mktemp("text") / "plays.jsonl"
  source = files.path("jaxlm://corpora/shakespeare.jsonl.gz")
  with gzip.open(source, "rt") as lines:
    texts = [json.loads(line)["text"][:3000] for line, _ in zip(lines, range(25))]  # noqa: B905
  file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
  return str(file)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
  """One folder for packed rows, shared by all runs."""
  return str(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="session")
def tiny(text, cache):
  """Makes the tiny run, with overrides."""

  def make(*overrides):
    cfg = config.load(f"{TINY}:text={text}")
    return config.override(cfg, [f"data.cache={cache}", *overrides])

  return make


@pytest.fixture
def copy(tmp_path):
  """Copies a workdir, its newest checkpoints left out; returns the copy's path."""

  def copied(workdir, *, newest, name="copy"):
    place = tmp_path / name
    shutil.copytree(workdir, place)
    for folder in (place / "checkpoints").iterdir():
      if int(folder.name) > newest:
        shutil.rmtree(folder)
    return place

  return copied


@pytest.fixture(autouse=True)
def lenient_dtypes():
  """Optax promotes dtypes freely."""
  with jax.numpy_dtype_promotion("standard"):
    yield
