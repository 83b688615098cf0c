"""The table of chips: every one found by its names, and figures in a sane relation."""

import pytest

from jaxlm.errors import InputError
from jaxlm.launch.chips import CHIPS, chip_named, chip_of

ALL = {"v4", "v5e", "v5p", "v6e", "v7x", "a100", "h100", "h200", "b200"}


def test_every_chip_of_the_issue_is_there():
  assert set(CHIPS) == ALL


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_chip_is_found_by_its_name_and_by_jax_s(name):
  chip = chip_named(name)
  assert chip.name == name
  assert all(chip_of(kind) is chip for kind in chip.kinds)


@pytest.mark.parametrize("name", sorted(ALL))
def test_its_figures_are_in_the_units_told(name):
  chip = CHIPS[name]
  assert 1e14 < chip.flops < 3e15
  assert 16e9 <= chip.hbm < 200e9
  assert 8e11 <= chip.hbm_bandwidth < 8e12
  assert 1e11 < chip.ici <= 9e11
  assert 1e9 < chip.dcn < 1e11 < chip.ici
  # Operations a byte at which a product stops waiting for memory.
  assert 150 < chip.flops / chip.hbm_bandwidth < 600


def test_a_name_that_is_none_names_the_nearest():
  with pytest.raises(InputError, match=r"no chip 'v5p8'.*Did you mean 'v5p'"):
    chip_named("v5p8")
  assert chip_of("cpu") is None
