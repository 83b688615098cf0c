import pytest

from jaxlm.models.families.gemma import gemma
from jaxlm.models.spec import LinearScaling

# Blocks before the pattern, blocks in it, repeats; windows of the first six blocks.
LAYOUTS = {
  "1-7b": ((0, 1, 28), (None,) * 6),
  "2-27b": ((0, 2, 23), (4096, None) * 3),
  "3-270m": ((0, 6, 3), (512,) * 5 + (None,)),
  "3-1b": ((2, 6, 4), (512,) * 5 + (None,)),
  "3-27b": ((2, 6, 10), (1024,) * 5 + (None,)),
}


@pytest.mark.parametrize("size", LAYOUTS)
def test_windows_stand_where_they_were_published(size):
  spec = gemma(size)
  parts, windows = LAYOUTS[size]
  assert (len(spec.prefix), len(spec.pattern), spec.repeats) == parts
  assert tuple(block.mixer.window for block in spec.blocks[:6]) == windows


def test_the_third_generation_turns_near_and_far_with_two_bases():
  near, far = (block.mixer.positions for block in gemma("3-27b").blocks[4:6])
  assert (near.base, near.scaling) == (10_000.0, None)
  assert (far.base, far.scaling) == (1e6, LinearScaling(factor=8.0))


@pytest.mark.parametrize(
  ("size", "scalar"), [("1-7b", 256), ("2-9b", 256), ("2-27b", 144), ("3-27b", 168)]
)
def test_scores_are_scaled_as_published(size, scalar):
  mixer = gemma(size).blocks[0].mixer
  assert (mixer.scale or mixer.head_dim**-0.5) == pytest.approx(scalar**-0.5)
