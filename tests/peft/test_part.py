"""Training a part of the model: which layers, and nothing else moves."""

import jax
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.models.spec import Precision
from jaxlm.peft import part
from jaxlm.peft.part import Part
from jaxlm.trees import named_leaves
from peft.test_lora import MODEL, base_of, decoder, outputs


def names_of(spec):
  model = decoder()
  tuned = part.tuning(spec, model)
  return {
    n: leaf.shape for n, leaf in named_leaves(tuned.init(base_of(model), None)).items()
  }


def test_presets_name_leaves():
  found = names_of(Part())
  assert all(
    name.split("/")[-1] in ("scale", "q_bias", "k_bias", "v_bias") for name in found
  )
  assert len(found) == 2 * 2 + 2 * 3 + 1
  assert list(names_of(Part(train=("embeddings",)))) == ["embed/table"]


def test_the_last_blocks_are_slices_of_stacks():
  """One block in front and two in a stack."""
  everything = ("",)
  one, two, three = (names_of(Part(train=everything, last=n)) for n in (1, 2, 3))
  assert all(name.startswith("layers/0/") for name in two)
  assert one.keys() == two.keys()
  assert {shape[0] for shape in one.values()} == {1}
  assert {shape[0] for shape in two.values()} == {2}
  assert {name.split("/")[0] for name in three} == {"layers", "prefix_0"}
  assert "final_norm/scale" not in three


@pytest.mark.parametrize("last", [None, 1, 2])
def test_attached_it_is_the_model_with_new_values_there(last):
  model = decoder()
  base = base_of(model)
  tuned = part.tuning(Part(train=("mlp", "norms-and-biases"), last=last), model)
  first = tuned.init(base, jax.random.key(0))
  np.testing.assert_array_equal(
    outputs(model, tuned.attach(base, first, None)), outputs(model, base)
  )
  moved = tuned.attach(base, jax.tree.map(lambda x: x + 1.0, first), None)
  slices, untouched = named_leaves(first), 0
  for name, leaf in named_leaves(base).items():
    new, rows = named_leaves(moved)[name], 0
    if name in slices:
      rows = len(slices[name])
      np.testing.assert_array_equal(
        new[len(leaf) - rows :], leaf[len(leaf) - rows :] + 1
      )
    np.testing.assert_array_equal(new[: len(leaf) - rows], leaf[: len(leaf) - rows])
    untouched += leaf.size - (slices[name].size if name in slices else 0)
  assert untouched > 0


def test_refusals():
  with pytest.raises(InputError, match=r"adapters.last: 0 is under 1"):
    Part(last=0)
  with pytest.raises(
    InputError, match=f"adapters.last: 4 blocks of a model of {len(MODEL.blocks)}"
  ):
    part.tuning(Part(last=4), decoder())
  with pytest.raises(InputError, match=r"adapters.train: 'embeddings' finds nothing"):
    part.tuning(Part(train=("embeddings",), last=1), decoder())


def test_they_train_in_float32_beside_a_model_in_bfloat16():
  model = decoder().clone(precision=Precision(params="bfloat16"))
  base = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), base_of(decoder()))
  tuned = part.tuning(Part(train=("",), last=1), model)
  first = tuned.init(base, jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(first)} == {np.dtype("float32")}
  np.testing.assert_array_equal(
    outputs(model, tuned.attach(base, first, None)), outputs(model, base)
  )
