import dataclasses
import inspect
import json

import pytest

from interop.goldens import CASES, FOLDER, opened
from jaxlm.errors import InputError
from jaxlm.interop import hf
from jaxlm.interop.gguf_keys import TOLD
from jaxlm.interop.keys import Config
from jaxlm.interop.registry import (
  FAMILIES,
  by_key,
  by_name,
  changes,
  family_of,
  read_model,
  rounded,
  write_keys,
)
from jaxlm.models.families import bloom, gemma, gpt2, llama, olmo2, phi3, qwen
from jaxlm.models.families.shape import shape_of
from jaxlm.models.spec import (
  LayerNorm,
  LinearScaling,
  NTKScaling,
  RMSNorm,
  RoPE,
  YaRNScaling,
)

SIZES = [
  (module, size)
  for module in (llama, qwen, gemma, phi3, olmo2, gpt2, bloom)
  for size in module.SHAPES
]


def name_of(value):
  return value if isinstance(value, str) else value.__name__.rpartition(".")[2]


def published(module, size):
  """Returns a published model and the name of its family."""
  model = inspect.unwrap(vars(module)[name_of(module)])(size)
  name = name_of(module)
  if "mistral" in size:
    name = "mistral"
  elif module in (qwen, gemma):
    name += size[0].replace("1", "")
  return model, name


every_size = pytest.mark.parametrize(("module", "size"), SIZES, ids=name_of)


def from_config(text):
  values = json.loads(text)
  family = by_key(values["model_type"], lambda one: one.hf.model_type, "config.json")
  return read_model(family, family.hf.keys, Config(values, "config.json"))


def from_metadata(family, model):
  """Returns the model that is read from the metadata written for this one."""
  values = write_keys(family, family.gguf.keys, model, "GGUF")
  told = {name: getattr(shape_of(model), name) for name in TOLD}
  return read_model(family, family.gguf.keys, Config(told | values, "file"))


def test_families_have_names_of_their_own():
  assert len({family.name for family in FAMILIES}) == len(FAMILIES)
  assert len({family.hf.model_type for family in FAMILIES}) == len(FAMILIES)
  for family in FAMILIES:
    assert by_name(family.name) is family


def test_an_unknown_name_is_told_the_nearest():
  with pytest.raises(
    InputError, match=r"family: no 'qwen4'; .* Did you mean 'qwen3'\?"
  ):
    by_name("qwen4")
  message = r"^file: the architecture 'gemma3_txt' is not known; known are llama, .*"
  with pytest.raises(InputError, match=message + r"Did you mean 'gemma3_text'\?"):
    by_key("gemma3_txt", lambda family: family.hf.model_type, "file")


@every_size
def test_a_published_model_is_written_and_read_in_both_formats(module, size):
  model, name = published(module, size)
  family = by_name(name)
  assert from_config(hf.write_config(family, model, "float32", {})) == model
  if model.blocks[0].mixer.window is None or name in ("gemma2", "gemma3", "phi3"):
    assert rounded(from_metadata(family, model)) == rounded(model)
  first = family_of(model)
  assert from_config(hf.write_config(first, model, "float32", {})) == model


@pytest.mark.parametrize("name", CASES)
def test_a_config_is_written_and_read_again(name):
  family, model = opened(name).family, opened(name).model
  text = hf.write_config(family, model, "bfloat16", {"bos_token_id": 3})
  assert from_config(text) == model
  values = json.loads(text)
  assert values["architectures"] == [family.hf.architecture]
  assert (values["torch_dtype"], values["bos_token_id"]) == ("bfloat16", 3)


@pytest.mark.parametrize(
  "name", [name for name in CASES if (FOLDER / name / "config.v4.json").exists()]
)
def test_the_older_form_of_a_config_says_the_same(name, tmp_path):
  text = (FOLDER / name / "config.v4.json").read_text()
  assert from_config(text) == opened(name).model


def with_mixer(model, **fields):
  def change(block):
    return dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, **fields))

  return dataclasses.replace(model, pattern=tuple(map(change, model.pattern)))


def with_block(model, **fields):
  pattern = tuple(dataclasses.replace(block, **fields) for block in model.pattern)
  return dataclasses.replace(model, pattern=pattern)


SMALL = llama.llama("stories-260k")
YARN = YaRNScaling(factor=4.0, original_length=128)


@pytest.mark.parametrize(
  ("model", "name"),
  [
    (SMALL, "llama"),
    (with_mixer(SMALL, window=9), "mistral"),
    (with_mixer(SMALL, bias="all"), "llama"),
    (with_mixer(SMALL, bias="qkv"), "qwen2"),
    (with_mixer(SMALL, bias="qkv", window=9), "qwen2"),
    (with_mixer(SMALL, qk_norm=RMSNorm()), "qwen3"),
    (with_mixer(SMALL, positions=RoPE(fraction=0.5)), "phi3"),
    (with_mixer(SMALL, positions=RoPE(scaling=YARN)), "llama"),
  ],
)
def test_a_model_belongs_to_the_first_family_that_can_say_it(model, name):
  assert family_of(model).name == name


@pytest.mark.parametrize(
  ("model", "message"),
  [
    (
      with_mixer(SMALL, positions=None),
      r"Nearest is llama, .* block\.mixer\.positions",
    ),
    (with_block(SMALL, norm=LayerNorm()), r"block\.norm: LayerNorm -> RMSNorm"),
    (
      with_mixer(SMALL, positions=RoPE(scaling=NTKScaling(factor=2.0))),
      r"block\.mixer\.positions\.scaling: NTKScaling",
    ),
    (dataclasses.replace(SMALL, embed_scale=2.0), r"embed_scale: 2\.0 -> 1\.0"),
    (with_mixer(SMALL, softcap=9.0), r"block\.mixer\.softcap: 9\.0 -> None"),
  ],
)
def test_a_model_that_no_family_can_say_is_told_what_would_change(model, message):
  with pytest.raises(InputError, match=f"no known family can say all of it.*{message}"):
    family_of(model)


@pytest.mark.parametrize(
  ("name", "model", "message"),
  [
    ("mistral", llama.llama("mistral-7b-v0.1"), r"block\.mixer\.window: 4096 -> None"),
    ("qwen2", with_mixer(SMALL, bias="qkv", window=9), r"mixer\.window: 9 -> None"),
    (
      "llama",
      with_mixer(
        SMALL,
        positions=RoPE(
          scaling=YaRNScaling(factor=4.0, original_length=128, magnitude=2.0)
        ),
      ),
      r"magnitude: 2\.0 -> None",
    ),
    ("llama", dataclasses.replace(SMALL, context=None), r"GGUF needs the longest"),
    ("gemma2", opened("gemma2").model, r"block\.mixer\.scale: 0\.3333"),
    ("gemma3", opened("gemma3").model, r"block\.mixer\.positions\.base: 100\.0"),
    ("llama", dataclasses.replace(SMALL, softcap=5.0), r"softcap: 5\.0 -> None"),
  ],
)
def test_what_gguf_cannot_say_is_named(name, model, message):
  with pytest.raises(
    InputError, match=rf"GGUF of the family {name} cannot .*{message}"
  ):
    from_metadata(by_name(name), model)


def test_a_scaling_of_windows_own_base_is_not_lost():
  model = gemma.gemma("3-4b")
  near = model.blocks[0].mixer.positions
  assert near.scaling is None
  far = dataclasses.replace(near, scaling=LinearScaling(factor=2.0))
  broken = dataclasses.replace(
    model, pattern=with_mixer(model, positions=far).pattern, prefix=model.prefix
  )
  with pytest.raises(InputError, match="cannot say all of it"):
    hf.write_config(by_name("gemma3"), broken, "float32", {})


def test_changes_name_what_several_blocks_share_once():
  model = gemma.gemma("3-1b")
  other = dataclasses.replace(model, head="untied")
  assert changes(model, other) == ["head: 'tied' -> 'untied'"]
  flat = dataclasses.replace(model, prefix=(), pattern=model.blocks, repeats=1)
  assert changes(model, flat) == []
  assert changes(SMALL, with_mixer(SMALL, scale=2.0)) == [
    "block.mixer.scale: None -> 2.0"
  ]


def test_floats_are_compared_as_float32():
  model = llama.llama("1-7b")
  near = dataclasses.replace(model, final_norm=RMSNorm(eps=1e-6 * (1 + 1e-9)))
  assert near != model
  assert rounded(near) == rounded(model)
