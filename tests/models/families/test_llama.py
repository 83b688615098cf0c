import inspect
from typing import get_args

import jax
import pytest

from jaxlm.errors import InputError
from jaxlm.models import count
from jaxlm.models.decoder import init
from jaxlm.models.families.llama import Size, llama
from models.specs import decoder

PUBLISHED = {
  "stories-260k": 260_032,
  "stories-15m": 15_191_712,
  "stories-42m": None,
  "stories-110m": None,
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
}


def test_every_size_is_listed():
  assert set(PUBLISHED) == set(get_args(Size))


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_number_of_parameters_is_the_published_one(size):
  spec = llama(size)
  shapes = jax.eval_shape(lambda key: init(decoder(spec), key), jax.random.key(0))
  total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert total == count.parameters(spec).total
  if PUBLISHED[size] is not None:
    assert total == PUBLISHED[size]


def test_the_vocabulary_can_be_replaced():
  assert llama("3.2-1b", vocab=100).vocab == 100
  assert llama("3.2-1b").vocab == 128_256


def test_an_unknown_size_names_the_nearest():
  with pytest.raises(InputError, match=r"no llama '3\.2-1B'.*Did you mean '3\.2-1b'\?"):
    inspect.unwrap(llama)("3.2-1B")  # around the check of types in tests
