import pytest

from jaxlm.errors import InputError
from jaxlm.peft.filters import chosen

NAMES = (
  "embed/table", "final_norm/scale", "head", "layers/0/mixer/q",
  "layers/0/mixer/q_bias", "layers/0/mixer/o", "layers/0/mixer_pre_norm/scale",
  "layers/0/mlp/up",
)  # fmt: skip


@pytest.mark.parametrize(
  ("wanted", "found"),
  [
    (("all-linear",), "layers/0/mixer/q layers/0/mixer/o layers/0/mlp/up"),
    (("attention",), "layers/0/mixer/q layers/0/mixer/o"),
    (("mlp", "mixer/q$"), "layers/0/mixer/q layers/0/mlp/up"),
    (
      ("norms-and-biases",),
      "final_norm/scale layers/0/mixer/q_bias layers/0/mixer_pre_norm/scale",
    ),
    (("embeddings", "^head$"), "embed/table head"),
    ((".*",), " ".join(NAMES)),
  ],
)
def test_presets_and_regexes(wanted, found):
  assert chosen("f", wanted, NAMES) == found.split()


@pytest.mark.parametrize(
  ("wanted", "told"),
  [
    (("mixer/qq",), r"f: 'mixer/qq' finds nothing among embed/table, .* head, "),
    (("all-linear", "zz"), "f: 'zz' finds nothing"),
    (("(",), r"f: '\(' is neither a preset .* nor a regex"),
    ((), "f: nothing is chosen; give all-linear"),
  ],
)
def test_refusals(wanted, told):
  with pytest.raises(InputError, match=told):
    chosen("f", wanted, NAMES)
