import json

import jax
import pytest
from etils import epath
from models.specs import decoder

from jaxlm import config
from jaxlm.errors import InputError
from jaxlm.interop.checkpoint import open_model
from jaxlm.runs.convert import Convert
from runs import pretrained

CONFIG = "configs/convert.py"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("convert") / "hf"
  params = pretrained.write(folder)
  return folder, jax.tree.leaves(params)


def leaves(place):
  opened = open_model(place)
  return jax.tree.leaves(opened.params(decoder(opened.model)))


def convert(source, target, *overrides):
  cfg = Convert(source=str(source), target=str(target))
  return config.override(cfg, overrides).run()


def test_both_ways_and_around_nothing_changes(source, tmp_path, capsys):
  """Hugging Face -> jaxlm -> GGUF -> Hugging Face -> jaxlm."""
  hf, params = source
  steps = [
    (hf, tmp_path / "own", []),
    (tmp_path / "own", tmp_path / "x.gguf", ["dtype=float32"]),
    (tmp_path / "x.gguf", tmp_path / "hf", ["form=hf"]),
    (tmp_path / "hf", tmp_path / "again", []),
    (tmp_path / "again", tmp_path / "out", []),
  ]
  kinds = ["jaxlm", "gguf", "hf", "jaxlm", "hf"]
  for (before, after, overrides), kind in zip(steps, kinds, strict=True):
    report = convert(before, after, *overrides)
    assert report["largest difference after a round trip"] == 0.0
    assert report["leaves"] == len(params)
    assert open_model(after).kind == kind
    assert open_model(after).model == pretrained.MODEL
    assert pretrained.equal(leaves(after), params)
  text = "The king <|im_end|> is 12 here\n\n  é"
  first = open_model(hf).tokenizer()
  for _, place, _ in steps:
    other = open_model(place).tokenizer()
    assert other.encode(text) == first.encode(text)
    assert other.stops == first.stops
    assert other.chat_template == pretrained.TEMPLATE
  assert "largest difference after a round trip: 0.0" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("overrides", "bound"),
  [("dtype=bfloat16", 0.008), ("dtype=float16", 0.001), ("dtype=q8_0", 0.02)],
)
def test_what_rounding_costs_is_told(source, tmp_path, overrides, bound):
  hf, params = source
  report = convert(hf, tmp_path / "x.gguf", overrides)
  difference = report["largest difference after a round trip"]
  found = leaves(tmp_path / "x.gguf")
  largest = max(float(abs(a - b).max()) for a, b in zip(found, params, strict=True))
  assert 0 < difference < bound
  assert difference == pytest.approx(largest)


def test_a_bfloat16_source_stays_so(source, tmp_path):
  hf, _ = source
  convert(hf, tmp_path / "half", "form=hf", "dtype=bfloat16")
  assert open_model(tmp_path / "half").dtype == "bfloat16"
  report = convert(tmp_path / "half", tmp_path / "own")
  assert report["dtype"] == "bfloat16 in memory, bfloat16 in the target"
  assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == (
    "bfloat16"
  )


@pytest.mark.parametrize(
  ("target", "overrides", "message"),
  [
    ("x.gguf", ["form=hf"], "a GGUF file, and it alone, ends in .gguf"),
    ("x", ["form=gguf"], "a GGUF file, and it alone, ends in .gguf"),
    ("x", ["dtype=q8_0"], "q8_0 cannot be written as jaxlm; use float32, bfloat16"),
    ("x", ["form=hf", "family=lama"], "no 'lama'.*Did you mean 'llama'"),
    ("x", ["form=hf", "family=gpt2"], "of the family gpt2 cannot say all of it"),
  ],
)
def test_what_cannot_be_written(source, tmp_path, target, overrides, message):
  with pytest.raises(InputError, match=message):
    convert(source[0], tmp_path / target, *overrides)
  assert list(tmp_path.iterdir()) == []


def test_a_target_is_never_overwritten(source, tmp_path):
  (tmp_path / "x").mkdir()
  with pytest.raises(InputError, match=r"target: .*x exists and is not overwritten"):
    convert(source[0], tmp_path / "x")
  with pytest.raises(InputError, match=r"source: .*absent does not exist"):
    convert(tmp_path / "absent", tmp_path / "y")


def test_a_model_without_a_tokenizer(source, tmp_path):
  bare = tmp_path / "bare"
  convert(source[0], bare, "form=hf", "tokenizer=without")
  assert not (bare / "tokenizer.json").exists()
  with pytest.raises(InputError, match=r"--config\.tokenizer=without"):
    convert(bare, tmp_path / "own")
  convert(bare, tmp_path / "x.gguf", "tokenizer=without")
  assert pretrained.equal(leaves(tmp_path / "x.gguf"), leaves(bare)) is False  # float16
  assert open_model(epath.Path(tmp_path / "x.gguf")).model == pretrained.MODEL


def test_the_config(source, tmp_path):
  cfg = config.load(f"{CONFIG}:source={source[0]},target={tmp_path / 'own'}")
  assert cfg == Convert(source=str(source[0]), target=str(tmp_path / "own"))
