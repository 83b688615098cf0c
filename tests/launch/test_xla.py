"""Compiler options by chip, and what a config makes of them."""

import jax
import jax.numpy as jnp
import pytest

from jaxlm.errors import InputError
from jaxlm.launch.chips import CHIPS
from jaxlm.launch.xla import BY_CHIP, describe, explained, options


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


def test_truths_are_booleans_in_any_case_and_the_rest_is_as_written():
  written = (("a", "True"), ("b", "FALSE"), ("c", "true"), ("d", "1"), ("e", "0.5"))
  given = options(None, written)
  assert given == {"a": True, "b": False, "c": True, "d": "1", "e": "0.5"}


GPU = "xla_gpu_enable_latency_hiding_scheduler"
COUNT = "xla_gpu_all_reduce_combine_threshold_bytes"


@pytest.mark.parametrize(
  ("option", "value", "said"),
  [
    ("xla_gpu_enable_wonders", "true", "xla_gpu_enable_wonders is no option"),
    (GPU, "maybe", f"{GPU} takes no value 'maybe'; it is of type bool"),
    (COUNT, "many", f"{COUNT} takes no value 'many'; it is of type int64"),
  ],
)
def test_a_refused_option_is_named(option, value, said):
  lowered = jax.jit(jnp.sin).lower(jnp.ones(()))
  with pytest.raises(InputError, match=f"compiler: {said}"), explained():
    lowered.compile(compiler_options=dict(options(None, ((option, value),))))


def test_what_libtpu_says_of_a_value_is_understood():
  said = "INVALID_ARGUMENT: Failed to parse 'many' into flag xla_tpu_scoped: "
  named = pytest.raises(InputError, match="xla_tpu_scoped takes no value 'many'")
  with named, explained():
    raise jax.errors.JaxRuntimeError(said)


def test_another_failure_goes_on_as_it_is():
  with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"), explained():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")


@pytest.mark.parametrize("chip", [n for n in BY_CHIP if CHIPS[n].platform == "gpu"])
def test_this_compiler_knows_the_options_for_gpus(chip):
  """A build for the CPU parses them too; those for TPUs only libtpu knows."""
  lowered = jax.jit(jnp.sin).lower(jnp.ones(()))
  lowered.compile(compiler_options=dict(options(CHIPS[chip], ())))
