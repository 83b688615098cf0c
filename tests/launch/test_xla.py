"""Compiler options by chip, and what a config makes of them."""

import jax
import jax.numpy as jnp
import pytest

from jaxlm.launch.chips import CHIPS
from jaxlm.launch.xla import BY_CHIP, describe, options


def test_options_are_for_chips_of_the_table_and_their_platform():
  for name, given in BY_CHIP.items():
    for option, value in given:
      assert option.startswith(f"xla_{CHIPS[name].platform}_"), option
      assert value


def test_a_config_adds_changes_and_takes_out():
  (first, value), *_ = BY_CHIP["v5p"]
  assert value == "true"
  given = options(CHIPS["v5p"], ((first, ""), ("xla_new", "7")))
  assert first not in given
  assert given["xla_new"] == "7"
  assert len(given) == len(BY_CHIP["v5p"])
  assert options(CHIPS["v5p"], ((first, "false"),))[first] is False


def test_a_chip_that_is_unknown_has_the_defaults_and_the_run_says_so():
  assert options(None, ()) == {}
  assert "defaults" in describe({})
  assert options(None, (("xla_new", "true"),)) == {"xla_new": True}
  assert "xla_new=7" in describe(options(None, (("xla_new", "7"),)))


@pytest.mark.parametrize("chip", [n for n in BY_CHIP if CHIPS[n].platform == "gpu"])
def test_this_compiler_knows_the_options_for_gpus(chip):
  """A build for the CPU parses them too; those for TPUs only libtpu knows."""
  lowered = jax.jit(jnp.sin).lower(jnp.ones(()))
  lowered.compile(compiler_options=dict(options(CHIPS[chip], ())))
  with pytest.raises(Exception, match="No such compile option"):
    lowered.compile(compiler_options={"xla_gpu_enable_wonders": "true"})
