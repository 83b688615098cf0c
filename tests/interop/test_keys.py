import pytest

from jaxlm.errors import InputError
from jaxlm.interop import keys
from jaxlm.interop.keys import Config, read_shape, write_shape
from jaxlm.models.families.shape import Shape

SIZES = {"vocab": 9, "dim": 8, "layers": 4, "heads": 2, "kv_heads": 2, "hidden": 16}
NUMBERS = tuple(keys.same(name, name) for name in SIZES)


def read(*more, **values):
  return read_shape((*NUMBERS, *more), Config(SIZES | values, "config.json"))


def refused(message, *more, **values):
  with pytest.raises(InputError, match=message):
    read(*more, **values)


def test_a_key_that_nothing_reads_is_refused_by_name():
  refused(
    r"^config\.json: not known .* differ: headz\. Did you mean 'heads'\?", headz=1
  )
  refused(r"differ: also, this\.", this=1, also=2)


def test_a_missing_key_is_named_with_what_stands_before_it():
  config = Config({}, "a.gguf", "llama.")
  with pytest.raises(InputError, match=r"^a\.gguf: the key 'llama\.block_count' is"):
    config.take("block_count")
  assert config.take("block_count", 3) == 3


def test_keys_inside_a_key_are_read_by_themselves():
  config = Config({"rope": {"theta": 1, "beta": 2}, "none": None, "empty": {}}, "file")
  inside = config.inside("rope")
  assert inside.take("theta") == 1
  with pytest.raises(InputError, match=r"^file: .*: rope\.beta\."):
    inside.finish()
  with pytest.raises(InputError, match=r"'rope\.gamma' is missing"):
    inside.take("gamma")
  assert config.inside("none") is None
  assert config.inside("empty") is None
  assert config.inside("absent", None) is None
  config.finish()


def test_a_key_that_should_hold_others_and_does_not_is_refused():
  config = Config({"rope": "yarn"}, "file")
  with pytest.raises(InputError, match="rope='yarn': not an object"):
    config.inside("rope")


def test_one_key_can_go_by_several_names():
  key = keys.named(("width", "n_width"), "window")
  assert read(key, n_width=3).window == read(key, width=3).window == 3
  assert key.write(Shape(**SIZES, window=3)) == {"width": 3}
  refused("the key 'width' is missing", key)
  refused("not known .*: n_width", key, width=3, n_width=4)


def test_values_are_mapped_and_others_are_refused():
  key = keys.mapped("biased", "bias", {False: "none", True: "all"}, False)
  assert read(key).bias == "none"
  assert read(key, biased=True).bias == "all"
  refused("biased='some': known are False, True", key, biased="some")
  assert key.write(Shape(**SIZES, bias="all")) == {"biased": True}
  with pytest.raises(InputError, match="bias: biased has no word for 'qkv'"):
    key.write(Shape(**SIZES, bias="qkv"))


def test_what_is_fixed_has_only_its_values():
  key = keys.fixed("act", "silu", "swish", default="silu")
  for values in ({}, {"act": "silu"}, {"act": "swish"}):
    read(key, **values)
  refused("act='gelu': only 'silu' or 'swish' is built", key, act="gelu")
  refused("the key 'act' is missing", keys.fixed("act", "silu"))
  assert key.write(Shape(**SIZES)) == {"act": "silu"}


def test_idle_keys_are_read_and_not_written():
  key = keys.idle("dropout", "seed")
  read(key, dropout=0.5)
  assert key.write(Shape(**SIZES)) == {}


def test_an_inverse_square_is_written_as_whole_as_it_was():
  key = keys.inverse_square("scalar", "scale", 256)
  assert read(key).scale == 1 / 16
  for scalar in (144, 168, 224, 9, 0.7, 2.5):
    shape = read(key, scalar=scalar)
    (back,) = key.write(shape).values()
    assert back == pytest.approx(scalar, rel=1e-12)
    assert read(key, scalar=back) == shape
  assert key.write(read(key, scalar=168)) == {"scalar": 168}
  with pytest.raises(InputError, match="scale: scalar needs a number"):
    key.write(Shape(**SIZES))


def test_what_is_always_so_has_no_key():
  key = keys.always(bias="qkv")
  assert read(key).bias == "qkv"
  assert key.write(Shape(**SIZES)) == {}


WINDOWS = keys.windows(lambda config, layers: (True, False) * (layers // 2))
LAYERS = {"num_hidden_layers": 4}


@pytest.mark.parametrize(
  ("values", "window", "local"),
  [
    ({}, None, None),
    ({"sliding_window": 3}, 3, (True, False, True, False)),
    ({"sliding_window": None}, None, None),
    ({"sliding_window": 3, "layer_types": ["sliding_attention"] * 4}, 3, None),
    ({"sliding_window": 3, "layer_types": ["full_attention"] * 4}, None, None),
    (
      {
        "sliding_window": 3,
        "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
      },
      3,
      (False, False, False, True),
    ),
  ],
)
def test_windows_stand_by_type_or_by_rule(values, window, local):
  shape = read(WINDOWS, **LAYERS, **values)
  assert (shape.window, shape.local) == (window, local)
  back = write_shape((*NUMBERS, WINDOWS), shape)
  assert read(WINDOWS, **LAYERS, **back) == shape


@pytest.mark.parametrize(
  "types", [["full_attention"] * 3, ["full_attention"] * 3 + ["chunked_attention"]]
)
def test_types_of_layers_are_two_and_one_for_each(types):
  message = "layer_types=.*: give one of sliding_attention and full_attention for each"
  refused(f"{message} of 4 layers", WINDOWS, **LAYERS, layer_types=types)


@pytest.mark.parametrize(
  "values",
  [{"dim": "8"}, {"dim": 8.5}, {"heads": None}, {"layers": [4]}, {"vocab": True}],
)
def test_a_value_of_another_kind_is_refused_with_its_field(values):
  (name,) = values
  refused(rf"^config\.json: {name}: .* the field takes int", **values)


def test_a_whole_number_can_stand_for_any():
  assert type(read(keys.same("eps", "eps"), eps=1).eps) is float
  assert read(keys.same("cap", "softcap", None)).softcap is None


@pytest.mark.parametrize(("dim", "heads"), [("8", 2), (8, 0), (8, "2"), (None, 2)])
def test_a_value_that_cannot_be_counted_with_is_refused(dim, heads):
  whole = keys.Key(
    lambda config: {"head_dim": config.take("dim") // config.take("heads")},
    lambda shape: {},
  )
  message = r"^config\.json: the value of 'heads', or one before it, is of another kind"
  refused(message, whole, dim=dim, heads=heads)
