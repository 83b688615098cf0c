"""What holds for every published size of every family."""

import inspect
import itertools
from typing import get_args

import jax
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.models import count
from jaxlm.models.decoder import init
from jaxlm.models.families import bloom, gemma, gpt2, llama, olmo2, phi3, qwen
from jaxlm.models.families.shape import arrange, shape_of
from jaxlm.models.spec import GLU, GQA, Block, Learned
from models.specs import decoder

# Each is what transformers 5.23 counts in the model of the published config.json, every
# tied matrix once. Of the stories models, Hugging Face's form is counted.
PUBLISHED = {
  llama: {
    "stories-260k": 260_032,
    "stories-15m": 15_191_712,
    "stories-42m": 41_689_600,
    "stories-110m": 109_529_856,
    "tiny-1.1b": 1_100_048_384,
    "1-7b": 6_738_415_616,
    "1-13b": 13_015_864_320,
    "1-33b": 32_528_943_616,
    "1-65b": 65_285_660_672,
    "2-7b": 6_738_415_616,
    "2-13b": 13_015_864_320,
    "2-70b": 68_976_648_192,
    "3-8b": 8_030_261_248,
    "3-70b": 70_553_706_496,
    "3.1-8b": 8_030_261_248,
    "3.1-70b": 70_553_706_496,
    "3.1-405b": 405_853_388_800,
    "3.2-1b": 1_235_814_400,
    "3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
  },
  qwen: {
    "2-0.5b": 494_032_768,
    "2-1.5b": 1_543_714_304,
    "2-7b": 7_615_616_512,
    "2-72b": 72_706_203_648,
    "2.5-0.5b": 494_032_768,
    "2.5-1.5b": 1_543_714_304,
    "2.5-3b": 3_085_938_688,
    "2.5-7b": 7_615_616_512,
    "2.5-14b": 14_770_033_664,
    "2.5-32b": 32_763_876_352,
    "2.5-72b": 72_706_203_648,
    "3-0.6b": 596_049_920,
    "3-1.7b": 1_720_574_976,
    "3-4b": 4_022_468_096,
    "3-8b": 8_190_735_360,
    "3-14b": 14_768_307_200,
    "3-32b": 32_762_123_264,
  },
  gemma: {
    "1-2b": 2_506_172_416,
    "1-7b": 8_537_680_896,
    "2-2b": 2_614_341_888,
    "2-9b": 9_241_705_984,
    "2-27b": 27_227_128_320,
    "3-270m": 268_098_176,
    "3-1b": 999_885_952,
    "3-4b": 3_880_263_168,
    "3-12b": 11_766_034_176,
    "3-27b": 27_009_346_304,
  },
  phi3: {
    "mini-4k": 3_821_079_552,
    "medium-4k": 13_960_238_080,
    "4-14b": 14_659_507_200,
  },
  olmo2: {
    "1b": 1_484_916_736,
    "7b": 7_298_617_344,
    "13b": 13_716_198_400,
    "32b": 32_234_279_936,
  },
  gpt2: {
    "124m": 124_439_808,
    "355m": 354_823_168,
    "774m": 774_030_080,
    "1.5b": 1_557_611_200,
  },
  bloom: {
    "560m": 559_214_592,
    "1.1b": 1_065_314_304,
    "1.7b": 1_722_408_960,
    "3b": 3_002_557_440,
    "7.1b": 7_069_016_064,
    "176b": 176_247_271_424,
  },
}


def name_of(value):
  return value if isinstance(value, str) else value.__name__.rpartition(".")[2]


def made_by(family):
  """Returns the function that a family's file is named for, its types unchecked."""
  return inspect.unwrap(vars(family)[name_of(family)])


SIZES = [(family, size) for family, sizes in PUBLISHED.items() for size in sizes]
every_family = pytest.mark.parametrize("family", PUBLISHED, ids=name_of)
every_size = pytest.mark.parametrize(("family", "size"), SIZES, ids=name_of)


@every_family
def test_every_size_is_listed(family):
  assert set(PUBLISHED[family]) == set(get_args(family.Size)) == set(family.SHAPES)


@every_size
def test_the_number_of_parameters_is_the_published_one(family, size):
  spec = made_by(family)(size)
  shapes = jax.eval_shape(lambda key: init(decoder(spec), key), jax.random.key(0))
  total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert total == count.parameters(spec).total == PUBLISHED[family][size]


def build_of(family, size):
  """Returns the function from a shape to a model that made this size."""
  if family in (qwen, gemma):
    return vars(family)[f"build{size[0]}"]
  return llama.build if family is phi3 else family.build


@every_size
def test_the_shape_of_a_model_builds_it_again(family, size):
  spec = made_by(family)(size)
  assert build_of(family, size)(shape_of(spec)) == spec


@every_family
def test_the_vocabulary_can_be_replaced(family):
  size = next(iter(PUBLISHED[family]))
  one, other = made_by(family)(size), made_by(family)(size, vocab=100)
  assert other.vocab == 100 != one.vocab
  assert other.blocks == one.blocks


@every_family
def test_an_unknown_size_names_the_nearest(family):
  size = list(PUBLISHED[family])[-1]
  wrong = size[:-1] + size[-1].upper()
  with pytest.raises(InputError) as caught:
    made_by(family)(wrong)
  told = f"size: no {name_of(family)} {wrong!r}; the sizes are "
  assert str(caught.value).startswith(told)
  assert str(caught.value).endswith(f" Did you mean {size!r}?")


def block(head_dim):
  mixer = GQA(heads=1, kv_heads=1, head_dim=head_dim)
  return Block(mixer=mixer, mlp=GLU(hidden=1))


def compiled(blocks):
  """Returns the fewest blocks that stand for these, by trying all."""
  fewest = len(blocks)
  for first, period in itertools.product(range(len(blocks)), range(1, len(blocks) + 1)):
    rest = blocks[first:]
    whole = len(rest) % period == 0
    if whole and rest == rest[:period] * (len(rest) // period):
      fewest = min(fewest, first + period)
  return fewest


@pytest.mark.parametrize("kinds", [1, 2, 3])
def test_blocks_are_arranged_with_the_fewest_to_compile(kinds):
  rng = np.random.default_rng(kinds)
  known = [block(2 * (1 + kind)) for kind in range(kinds)]
  for length in list(range(1, 14)) * 4:
    blocks = tuple(known[i] for i in rng.integers(0, kinds, length))
    if length > 6:
      blocks = blocks[:2] + blocks[2:5] * 3  # one that has a pattern
    prefix, pattern, repeats = arrange(blocks)
    assert prefix + pattern * repeats == blocks
    assert len(prefix) + len(pattern) == compiled(blocks)


def test_what_stands_before_a_pattern_is_a_prefix():
  near, far = block(2), block(4)
  assert arrange((near,) * 5) == ((), (near,), 5)
  assert arrange((near, far) * 3) == ((), (near, far), 3)
  assert arrange((near, near, far, far, far)) == ((near, near), (far,), 3)
  assert arrange((near,)) == ((), (near,), 1)


def test_a_window_for_another_number_of_layers_is_refused():
  shape = gemma.SHAPES["3-1b"]
  with pytest.raises(InputError, match="local: 26 entries for 25 layers"):
    gemma.build3(type(shape)(**vars(shape) | {"layers": 25}))


def test_positions_that_are_learned_need_a_length():
  shape = gpt2.SHAPES["124m"]
  with pytest.raises(InputError, match="context: learned positions need a length"):
    gpt2.build(type(shape)(**vars(shape) | {"context": None}))
  assert gpt2.gpt2("124m").positions == Learned(length=1024)
