import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.interop import gguf_keys as gg
from jaxlm.interop.gguf_keys import FREQUENCIES, LONG, SHORT, WAVELENGTHS
from jaxlm.interop.keys import Config, read_shape, write_shape
from jaxlm.models.families.shape import Shape
from jaxlm.models.positions import rope_frequencies
from jaxlm.models.spec import (
  LinearScaling,
  Llama3Scaling,
  LongScaling,
  RoPE,
  YaRNScaling,
)

TOLD = {"vocab": 9, "tied": False, "bias": "none", "mlp_bias": "none"}
FILE = {
  "embedding_length": 64,
  "block_count": 6,
  "feed_forward_length": 32,
  "context_length": 256,
  "attention.head_count": 4,
}
KEYS = (*gg.SIZES, gg.rope())
# What `KEYS` read in `FILE`.
SHAPE = Shape(
  vocab=9, dim=64, layers=6, heads=4, kv_heads=4, hidden=32, head_dim=16, context=256,
  rope=RoPE(),
)  # fmt: skip


def read(*keys, **values):
  given = {name.replace("__", "."): value for name, value in values.items()}
  return read_shape(keys or KEYS, Config(TOLD | FILE | given, "a.gguf", "llama."))


def refused(message, *keys, **values):
  with pytest.raises(InputError, match=rf"^a\.gguf: .*{message}"):
    read(*keys, **values)


def with_rope(**fields):
  return Shape(**vars(SHAPE) | {"rope": RoPE(**fields)})


def test_tensors_tell_what_the_metadata_does_not():
  shapes = {"token_embd.weight": (9, 4)}
  assert gg.told(shapes) == TOLD | {"tied": True}
  names = ("output.weight", "blk.0.attn_q.bias", "blk.0.ffn_down.bias")
  found = gg.told(shapes | dict.fromkeys(names, ()))
  assert found == TOLD | {"bias": "qkv", "mlp_bias": "all"}
  for name in ("blk.0.attn_qkv.bias", "blk.0.attn_output.bias"):
    bias = "all" if "output" in name else "qkv"
    assert gg.told(shapes | {name: ()}) == TOLD | {"tied": True, "bias": bias}


def test_sizes_have_defaults():
  assert read() == SHAPE
  keys = {"attention__head_count_kv": 2, "attention__key_length": 24}
  shape = read(**keys, attention__value_length=24)
  assert (shape.kv_heads, shape.head_dim) == (2, 24)
  assert read(**keys).head_dim == 24


def test_sizes_are_written_in_full():
  assert read_shape(KEYS, Config(TOLD | write_shape(KEYS, SHAPE), "file")) == SHAPE
  short = Shape(**vars(SHAPE) | {"context": None})
  with pytest.raises(InputError, match=r"model\.context: GGUF needs the longest"):
    write_shape(KEYS, short)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"attention__value_length": 8}, r"llama\.attention\.value_length=8: only 16,"),
    ({"attention__causal": False}, r"llama\.attention\.causal=False: only True is"),
    ({"expert_count": 8}, r"llama\.expert_count=8: only 0 is built"),
    ({"attention__scale": 0.5}, r"not known .*: llama\.attention\.scale"),
    ({"attention__head_count_kv": [4, 2]}, r"kv_heads: .* the field takes int"),
    ({"attention__head_count": 0}, r"the value of 'llama\.embedding_length', or one"),
    (
      {"rope__scaling__type": "dynamic", "rope__scaling__factor": 2.0},
      "known are none",
    ),
    ({"rope__scaling__attn_factor": 0.5}, r"attn_factor=0\.5: only 1\.0 is built"),
    (
      {"rope__scaling__type": "yarn", "rope__scaling__yarn_log_multiplier": 0.1},
      r"not known .*: llama\.rope\.scaling\.yarn_log_multiplier",
    ),
  ],
)
def test_what_is_not_built_is_refused_by_name(values, message):
  refused(message, **values)


def test_a_missing_size_is_named():
  kept = {name: value for name, value in FILE.items() if name != "block_count"}
  config = Config(TOLD | kept, "a.gguf", "llama.")
  with pytest.raises(InputError, match=r"the key 'llama\.block_count' is missing"):
    read_shape(KEYS, config)


BANDS = Llama3Scaling(
  factor=8.0, original_length=20, low_frequency=1.5, high_frequency=3.0
)
LONG_ROPE = LongScaling(
  short=(1.0, 1.5, 2.0, 2.5),
  long=(3.0, 4.0, 5.0, 6.0),
  original_length=64,
  length=256,
  magnitude=1.25,
)


@pytest.mark.parametrize(
  "fields",
  [
    {"base": 500.0},
    {"fraction": 0.5},
    {"scaling": LinearScaling(factor=8.0)},
    {"scaling": YaRNScaling(factor=4.0, original_length=64)},
    {"base": 5e5, "scaling": Llama3Scaling(factor=32.0)},
    {"base": 500.0, "scaling": BANDS},
    {"fraction": 0.5, "scaling": LONG_ROPE},
  ],
)
def test_what_is_written_reads_the_same(fields):
  shape = with_rope(**fields)
  values = write_shape(KEYS, shape)
  assert read_shape(KEYS, Config(TOLD | values, "file")) == shape


def divisors(rope):
  plain, _ = rope_frequencies(RoPE(base=rope.base, fraction=rope.fraction), 16)
  return (plain / rope_frequencies(rope, 16)[0]).astype(np.float32)


def test_divided_frequencies_are_recognised_by_the_published_bands():
  rope = RoPE(base=5e5, scaling=Llama3Scaling(factor=8.0))
  factors = {FREQUENCIES: divisors(rope), "rope.freq_base": 5e5}
  assert read(**factors).rope == rope
  assert WAVELENGTHS not in write_shape(KEYS, with_rope(**vars(rope)))


def test_divided_frequencies_that_are_not_recognised_are_taken_as_they_stand():
  rope = RoPE(base=500.0, scaling=BANDS)
  found = read(**{FREQUENCIES: divisors(rope), "rope.freq_base": 500.0}).rope
  assert isinstance(found.scaling, LongScaling)
  ours, wanted = rope_frequencies(found, 16), rope_frequencies(rope, 16)
  np.testing.assert_allclose(ours[0], wanted[0], rtol=1e-6)
  assert ours[1] == wanted[1] == 1


def test_two_lists_of_factors_make_long_scaling():
  lists = {
    LONG: np.asarray(LONG_ROPE.long, np.float32),
    SHORT: np.asarray(LONG_ROPE.short, np.float32),
    "rope.dimension_count": 8,
    "rope.scaling.original_context_length": 64,
  }
  scaling = read(**lists, **{"rope.scaling.attn_factor": 1.25}).rope.scaling
  assert scaling == LONG_ROPE
  # Without the key: the factor that the lengths give.
  usual = read(**lists, **{"rope.scaling.type": "longrope"}).rope.scaling.magnitude
  assert usual == pytest.approx((1 + np.log(4) / np.log(64)) ** 0.5)


@pytest.mark.parametrize("name", [FREQUENCIES, LONG])
@pytest.mark.parametrize("kind", ["linear", None, "yarn"])
def test_two_scalings_at_once_are_refused(name, kind):
  lists = dict.fromkeys((name, SHORT), np.ones(8, np.float32))
  values = {"rope.scaling.type": kind, "rope.scaling.factor": 2.0}
  refused(r"llama\.rope\.scaling\.type=.*besides the tensors", **lists, **values)


@pytest.mark.parametrize(
  "values",
  [
    {"rope__scaling__type": "none", "rope__scaling__factor": 2.0},
    {"rope__scaling__factor": 1.0},
    {"rope__scaling__factor": 0.0, "rope__scaling__finetuned": False},
    {"rope__scaling__attn_factor": 1.0},
  ],
)
def test_no_scaling_can_be_said_in_several_ways(values):
  assert read(**values).rope == RoPE()


def test_an_older_key_scales_too():
  assert read(rope__scale_linear=4.0).rope.scaling == LinearScaling(factor=4.0)


@pytest.mark.parametrize(
  ("values", "window", "local"),
  [
    ({}, None, None),
    ({"attention__sliding_window": 0}, None, None),
    ({"attention__sliding_window": 7}, 7, (True, True, False) * 2),
    (
      {"attention__sliding_window": 7, "attention__sliding_window_pattern": 2},
      7,
      (True, False) * 3,
    ),
    (
      {
        "attention__sliding_window": 7,
        "attention__sliding_window_pattern": [False] * 5 + [True],
      },
      7,
      (False,) * 5 + (True,),
    ),
  ],
)
def test_windows_follow_the_pattern_of_the_file(values, window, local):
  shape = read(*KEYS, gg.window(every=3), **values)
  assert (shape.window, shape.local) == (window, local)


def test_a_window_can_stand_in_every_block():
  key = gg.window()
  assert read(*KEYS, key, attention__sliding_window=7).window == 7
  assert read(*KEYS, key, attention__sliding_window=7).local is None
  refused("not known", *KEYS, key, attention__sliding_window_pattern=2)
  assert key.write(SHAPE) == {}
  assert key.write(read(*KEYS, key, attention__sliding_window=7)) == {
    "attention.sliding_window": 7
  }


def test_two_bases_of_rotary_positions():
  keys = (*gg.SIZES, gg.two_ropes(1e4))
  shape = read(*keys, rope__freq_base=1e6)
  assert (shape.rope.base, shape.local_rope.base) == (1e6, 1e4)
  shape = read(*keys, rope__freq_base=1e6, rope__freq_base_swa=100.0)
  assert shape.local_rope == RoPE(base=100.0)


def test_the_largest_model_scales_scores_by_its_width():
  key = gg.scale_of_27b(layers=6)
  wide = {"attention__key_length": 32, "attention__value_length": 32}
  assert read(*KEYS, key, **wide).scale == 16**-0.5
  assert read(*KEYS, key, **wide, block_count=5).scale == 32**-0.5
