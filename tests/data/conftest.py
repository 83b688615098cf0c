"""A slice of the real corpus, and short ways to write and prepare corpora."""

import gzip
import json

import pytest

from jaxlm import files
from jaxlm.data import corpus, sources, tokenizers
from jaxlm.data.spec import Data, Weighted

SHAKESPEARE = files.path("jaxlm://corpora/shakespeare.jsonl.gz")


@pytest.fixture(scope="session")
def plays():
  """The texts of 60 scenes, about 350 kB."""
  with gzip.open(SHAKESPEARE, "rt") as lines:
    return [json.loads(line)["text"] for _, line in zip(range(60), lines, strict=False)]


@pytest.fixture(scope="session")
def unigram(plays):
  return tokenizers.build(tokenizers.SentencePiece(vocab=1024), plays)


@pytest.fixture(scope="session")
def bpe(plays):
  return tokenizers.build(tokenizers.SentencePiece(vocab=1024, kind="bpe"), plays)


@pytest.fixture(params=["bytes", "unigram", "bpe"])
def tokenizer(request):
  """Each kind of tokenizer."""
  if request.param == "bytes":
    return tokenizers.ByteTokenizer()
  return request.getfixturevalue(request.param)


def write_jsonl(file, texts):
  file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  return sources.Jsonl(path=str(file))


def data_of(*found, **fields):
  """A spec of byte tokens whose sources weigh the same, unless told otherwise."""
  weighted = tuple(
    source if isinstance(source, Weighted) else Weighted(source=source)
    for source in found
  )
  defaults = {"tokenizer": tokenizers.Bytes(), "seq_len": 32, "batch": 4}
  return Data(sources=weighted, **{**defaults, **fields})


@pytest.fixture
def jsonl(tmp_path):
  """Writes texts to a file of JSON lines; returns the source."""
  return lambda name, texts: write_jsonl(tmp_path / name, texts)


@pytest.fixture
def spec():
  """Makes a `Data` of some sources."""
  return data_of


@pytest.fixture(scope="session")
def prepared(plays, tmp_path_factory):
  """The scenes by bytes in rows of 64, two sources at weights 3 and 1."""
  folder = tmp_path_factory.mktemp("prepared")
  data = data_of(
    Weighted(source=write_jsonl(folder / "a.jsonl", plays[:40]), weight=3.0),
    Weighted(source=write_jsonl(folder / "b.jsonl", plays[40:]), weight=1.0),
    seq_len=64,
    batch=8,
    held_out=0.1,
  )
  return data, corpus.prepare(data, str(folder / "cache"))
