import subprocess
import sys

import pytest

from jaxlm.errors import InputError
from jaxlm.models.spec import (
  GLU,
  GQA,
  LM,
  Block,
  LongScaling,
  NTKScaling,
  RoPE,
  for_length,
)

BLOCK = Block(mixer=GQA(heads=4, kv_heads=2, head_dim=8), mlp=GLU(hidden=8))


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: GQA(heads=4, kv_heads=3, head_dim=8), "kv_heads: 3 does not divide"),
    (lambda: GQA(heads=4, kv_heads=0, head_dim=8), "kv_heads: 0"),
    (lambda: GQA(heads=4, kv_heads=4, head_dim=0), "head_dim: 0"),
    (lambda: GQA(heads=4, kv_heads=4, head_dim=8, window=0), "window: 0"),
    (lambda: RoPE(fraction=1.5), "fraction: 1.5"),
    (lambda: LM(vocab=0, dim=8, pattern=(BLOCK,), repeats=1), "model.vocab: 0"),
    (lambda: LM(vocab=8, dim=8, pattern=(), repeats=1), "model.pattern"),
    (lambda: LM(vocab=8, dim=8, pattern=(BLOCK,), repeats=0), "model.repeats: 0"),
    (
      lambda: LM(vocab=8, dim=8, pattern=(BLOCK,), repeats=1, context=0),
      "model.context: 0",
    ),
  ],
)
def test_what_no_model_can_be(make, message):
  with pytest.raises(InputError, match=message):
    make()


def test_long_scaling_has_a_factor_for_each_pair():
  scaling = LongScaling(
    short=(1.0, 2.0), long=(1.0, 2.0, 3.0), original_length=4, length=8, magnitude=1.0
  )
  rope = RoPE(fraction=0.5, scaling=scaling)
  with pytest.raises(InputError, match=r"long: 3 factors for 2 rotated pairs"):
    GQA(heads=2, kv_heads=1, head_dim=8, positions=rope)


def test_blocks_stand_in_order():
  other = Block(mixer=BLOCK.mixer, mlp=None)
  spec = LM(vocab=8, dim=8, prefix=(other,), pattern=(BLOCK, other), repeats=2)
  assert spec.blocks == (other, BLOCK, other, BLOCK, other)


def test_specs_and_counts_need_no_jax():
  code = (
    "import sys; from jaxlm.models import count; "
    "from jaxlm.models.families.llama import llama; "
    "print(count.parameters(llama('3-8b')).total, 'jax' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout == "8030261248 False\n"


@pytest.mark.parametrize(
  ("head_dim", "rope"),
  [
    (7, RoPE()),
    (8, RoPE(fraction=0.1)),
    (2, RoPE(scaling=NTKScaling(factor=2.0))),
  ],
)
def test_rotary_dims_come_in_pairs(head_dim, rope):
  with pytest.raises(InputError, match=r"positions\.(fraction|scaling): "):
    GQA(heads=2, kv_heads=1, head_dim=head_dim, positions=rope)


def test_a_length_chooses_the_factors_of_every_block():
  scaling = LongScaling(
    short=(1.0,) * 4, long=(2.0,) * 4, original_length=4, length=99, magnitude=1.0
  )
  long = Block(
    mixer=GQA(heads=2, kv_heads=1, head_dim=8, positions=RoPE(scaling=scaling)),
    mlp=None,
  )
  spec = LM(vocab=8, dim=8, prefix=(long, BLOCK), pattern=(long,), repeats=2)
  found = for_length(spec, 3)
  lengths = [
    b.mixer.positions.scaling and b.mixer.positions.scaling.length for b in found.blocks
  ]
  assert lengths == [3, None, 3, 3]
  assert for_length(found, 99) == spec
