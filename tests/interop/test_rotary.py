import math

import pytest

from jaxlm.errors import InputError
from jaxlm.interop import rotary
from jaxlm.interop.keys import Config
from jaxlm.models.families.shape import Shape
from jaxlm.models.spec import (
  LinearScaling,
  Llama3Scaling,
  LongScaling,
  NTKScaling,
  RoPE,
  YaRNScaling,
)

CONTEXT = {"max_position_embeddings": 64}
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 16}
LISTS = {"short_factor": [1.0, 2.0], "long_factor": [3, 4.5]}
LONG = LongScaling(
  short=(1.0, 2.0), long=(3.0, 4.5), original_length=16, length=64, magnitude=0.0
)


def shape(rope, local_rope=None):
  sizes = {"vocab": 9, "dim": 8, "layers": 1, "heads": 1, "kv_heads": 1, "hidden": 8}
  return Shape(**sizes, rope=rope, local_rope=local_rope)


def read(key, **values):
  config = Config(CONTEXT | values, "config.json")
  config.take("max_position_embeddings")
  fields = key.read(config)
  config.finish()
  return fields


def refused(message, key, **values):
  with pytest.raises(InputError, match=message):
    read(key, **values)


SCALINGS = [
  ({}, None),
  ({"rope_type": "default"}, None),
  ({"rope_type": "linear", "factor": 8.0}, LinearScaling(factor=8.0)),
  (
    {"rope_type": "llama3", "factor": 8.0, **BANDS, **ORIGINAL},
    Llama3Scaling(factor=8.0, original_length=16),
  ),
  (
    {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    YaRNScaling(factor=4.0, original_length=16),
  ),
  (
    {"rope_type": "yarn", "factor": 4.0, "truncate": True, "beta_fast": None},
    YaRNScaling(factor=4.0, original_length=64),
  ),
  (
    {
      "rope_type": "yarn",
      "factor": 4.0,
      "beta_fast": 16.0,
      "beta_slow": 2.0,
      "attention_factor": 1.5,
      **ORIGINAL,
    },
    YaRNScaling(
      factor=4.0, original_length=16, beta_fast=16.0, beta_slow=2.0, magnitude=1.5
    ),
  ),
]


@pytest.mark.parametrize(("inside", "scaling"), SCALINGS)
def test_both_forms_read_the_same(inside, scaling):
  wanted = {"rope": RoPE(base=500.0, scaling=scaling)}
  newer = {"rope_theta": 500.0, **inside}
  assert read(rotary.rope(), rope_parameters=newer) == wanted
  assert read(rotary.rope(), rope_theta=500.0, rope_scaling=inside) == wanted
  kind = {"type" if name == "rope_type" else name: v for name, v in inside.items()}
  assert read(rotary.rope(), rope_theta=500.0, rope_scaling=kind) == wanted


@pytest.mark.parametrize("scaling", [scaling for _, scaling in SCALINGS])
def test_what_is_written_reads_the_same(scaling):
  rope = RoPE(base=500.0, scaling=scaling)
  written = rotary.rope().write(shape(rope))
  assert "rope_parameters" not in written
  assert read(rotary.rope(), **written) == {"rope": rope}


def test_the_base_has_a_default_of_the_family():
  assert read(rotary.rope())["rope"].base == 10_000
  assert read(rotary.rope(), rope_scaling=None)["rope"] == RoPE()
  assert read(rotary.rope(7.0), rope_theta=5)["rope"].base == 5.0
  assert read(rotary.rope(7.0), rope_parameters={"rope_type": "default"}) == {
    "rope": RoPE(base=7.0)
  }


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
  ("inside", "message"),
  [
    (
      {"rope_type": "dynamic", "factor": 2.0},
      r"rope_type='dynamic': known are default,",
    ),
    ({"type": "mrope"}, r"known are default, linear, llama3, yarn and longrope"),
    (
      {"rope_type": "yarn", "factor": 2.0, "truncate": False},
      "truncate=False: only true",
    ),
    ({"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}, r"differ: \w+\.mscale\."),
    ({"rope_type": "linear", "factor": 2.0, "alpha": 1}, r"differ: \w+\.alpha\."),
    ({"rope_type": "linear"}, r"the key '\w+\.factor' is missing"),
    ({"rope_type": "yarn"}, r"the key '\w+\.factor' is missing"),
    ({"rope_type": "llama3", "factor": 2.0, **BANDS}, r"original_max_.* is missing"),
    (
      {"rope_type": "llama3", "factor": 2.0, **ORIGINAL},
      r"'\w+\.low_freq_factor' is missing",
    ),
    ({"rope_type": "longrope", **ORIGINAL}, r"'\w+\.short_factor' is missing"),
  ],
)
def test_what_is_not_built_is_refused_by_name(place, inside, message):
  refused(rf"^config\.json: .*{message}", rotary.rope(), **{place: inside})


def test_a_part_of_a_head_turns_only_where_that_is_known():
  whole = {"rope_theta": 5.0, "partial_rotary_factor": 1.0}
  assert read(rotary.rope(), rope_parameters=whole)["rope"].fraction == 1
  half = {"rope_theta": 5.0, "partial_rotary_factor": 0.5}
  message = r"rope_parameters.*partial_rotary_factor: here all of a head turns"
  refused(message, rotary.rope(), rope_parameters=half)
  refused("not known", rotary.rope(), partial_rotary_factor=0.5)
  found = read(rotary.partial_rope(), rope_parameters=half)
  assert found == read(rotary.partial_rope(), rope_theta=5.0, partial_rotary_factor=0.5)
  assert found == {"rope": RoPE(base=5.0, fraction=0.5)}


def long(magnitude):
  return LongScaling(**vars(LONG) | {"magnitude": magnitude})


@pytest.mark.parametrize(
  ("inside", "magnitude"),
  [
    ({}, math.sqrt(1 + math.log(4) / math.log(16))),
    ({"factor": 8.0}, math.sqrt(1 + math.log(8) / math.log(16))),
    ({"factor": 1.0}, 1.0),
    ({"attention_factor": 1.25}, 1.25),
  ],
)
@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_the_magnitude_of_long_scaling_follows_the_lengths(inside, magnitude, kind):
  key, lists = rotary.partial_rope(), {"type": kind, **LISTS, **inside}
  found = read(key, rope_scaling=lists, **ORIGINAL)["rope"].scaling
  assert found.magnitude == pytest.approx(magnitude, rel=1e-15)
  assert found == long(found.magnitude)
  assert read(key, rope_parameters=lists | ORIGINAL)["rope"].scaling == found


def test_long_scaling_is_written_with_its_original_length():
  rope = RoPE(fraction=0.5, scaling=long(rotary.magnitude(64, 16)))
  written = rotary.partial_rope().write(shape(rope))
  assert written["original_max_position_embeddings"] == 16
  assert read(rotary.partial_rope(), **written) == {"rope": rope}


def test_partial_rotary_positions_have_one_scaling():
  linear = {"type": "linear", "factor": 2.0}
  message = "rope_scaling=.*here only longrope is built"
  refused(message, rotary.partial_rope(), rope_scaling=linear)


NEAR = {"rope_theta": 100.0, "rope_type": "default"}
FAR = {"rope_theta": 1000.0, "rope_type": "linear", "factor": 8.0}
TWO = {
  "rope": RoPE(base=1000.0, scaling=LinearScaling(factor=8.0)),
  "local_rope": RoPE(base=100.0),
}


def test_two_bases_are_read_in_both_forms():
  key = rotary.two_ropes(1e6, 1e4)
  both = {"full_attention": FAR, "sliding_attention": NEAR}
  assert read(key, rope_parameters=both) == TWO
  older = {"rope_theta": 1000.0, "rope_local_base_freq": 100}
  assert read(key, **older, rope_scaling={"rope_type": "linear", "factor": 8}) == TWO
  assert read(key, **key.write(shape(**TWO))) == TWO


def test_two_bases_have_two_defaults():
  key = rotary.two_ropes(1e6, 1e4)
  usual = {"rope": RoPE(base=1e6), "local_rope": RoPE(base=1e4)}
  assert read(key) == usual
  kind = {"rope_type": "default"}
  for one in (kind, {}, None):
    both = {"full_attention": one, "sliding_attention": one}
    assert read(key, rope_parameters=both) == usual


@pytest.mark.parametrize(
  ("both", "message"),
  [
    ({"full_attention": FAR}, r"'rope_parameters\.sliding_attention' is missing"),
    (NEAR, r"'rope_parameters\.full_attention' is missing"),
    (
      {"full_attention": FAR, "sliding_attention": NEAR, "chunked_attention": NEAR},
      r"differ: rope_parameters\.chunked_attention",
    ),
    (
      {"full_attention": FAR, "sliding_attention": NEAR | {"beta": 1}},
      r"differ: rope_parameters\.sliding_attention\.beta",
    ),
  ],
)
def test_two_bases_stand_under_known_names(both, message):
  refused(message, rotary.two_ropes(1e6, 1e4), rope_parameters=both)


def test_a_scaling_without_a_word_is_not_written():
  written = rotary.rope().write(shape(RoPE(scaling=NTKScaling(factor=2.0))))
  assert written == {"rope_theta": 10_000.0, "rope_scaling": None}
