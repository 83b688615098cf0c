import dataclasses

import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.interop.families.bloom import TABLE as BLOOM
from jaxlm.interop.families.gpt2 import TABLE as GPT2
from jaxlm.interop.families.llama import GGUF_TABLE
from jaxlm.interop.families.phi3 import TABLE as PHI3
from jaxlm.interop.names import (
  Entry,
  Piece,
  check_tensors,
  entries,
  fused,
  layer_norm,
  row,
)
from jaxlm.interop.registry import FAMILIES
from jaxlm.models.spec import GLU, GQA, LM, MLP, Block, Learned

SIZES = {"V": 7, "D": 6, "H": 4, "G": 2, "K": 8, "F": 10, "T": 9, "Z": 2, "P": 4}
MODEL = LM(
  vocab=7,
  dim=6,
  prefix=(Block(mixer=GQA(heads=4, kv_heads=2, head_dim=8), mlp=GLU(hidden=10)),),
  pattern=(
    Block(mixer=GQA(heads=4, kv_heads=2, head_dim=8), mlp=GLU(hidden=10)),
    Block(mixer=GQA(heads=2, kv_heads=1, head_dim=4), mlp=MLP(hidden=12)),
  ),
  repeats=3,
)
SHAPES = {
  "embed/table": (7, 6),
  "prefix_0/mixer/q": (6, 4, 8),
  "layers/0/mixer/q": (3, 6, 4, 8),
  "layers/1/mixer/q": (3, 6, 2, 4),
}
TABLE = (
  row("embed/table", "wte", "V D"),
  row("mixer/q", "h.{i}.q", "(H K) D -> D H K"),
  row("mixer/q_bias", "h.{i}.q_bias", "(H K) -> H K"),
)


def entry(row, **sizes):
  pieces = tuple(Piece(part.ours, None) for part in row.parts)
  return Entry("tensor", pieces, row, SIZES | sizes)


def counted(*shape):
  return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def only(arrays):
  (array,) = arrays.values()
  return array


def test_a_row_says_where_each_element_stands():
  one = entry(row("q", "theirs", "(H K) D -> D H K"))
  assert one.shape == (32, 6)
  tensor = counted(32, 6)
  ours = only(one.split(tensor))
  assert ours.shape == (6, 4, 8)
  assert ours[5, 3, 2] == tensor[3 * 8 + 2, 5]


def test_a_row_without_an_arrow_is_taken_as_it_is():
  one = entry(row("table", "theirs", "V D"))
  tensor = counted(7, 6)
  assert one.shape == (7, 6)
  ours = only(one.split(tensor))
  assert np.shares_memory(ours, tensor)
  assert np.array_equal(ours, tensor)


def test_rows_of_unequal_width_follow_each_other():
  parts = {"q": "(H K) D -> D H K", "k": "(G K) D -> D G K", "v": "(G K) D -> D G K"}
  one = entry(fused("theirs", parts, axis=0))
  assert one.shape == (32 + 16 + 16, 6)
  tensor = counted(64, 6)
  q, k, v = one.split(tensor).values()
  assert (q.shape, k.shape, v.shape) == ((6, 4, 8), (6, 2, 8), (6, 2, 8))
  assert k[1, 1, 3] == tensor[32 + 8 + 3, 1]
  assert v[1, 1, 3] == tensor[48 + 8 + 3, 1]


def test_parts_can_lie_along_any_axis():
  one = entry(
    fused("theirs", {"q": "D (H K) -> D H K", "k": "D (G K) -> D G K"}, axis=1)
  )
  assert one.shape == (6, 48)
  tensor = counted(6, 48)
  _, k = one.split(tensor).values()
  assert k[2, 1, 5] == tensor[2, 32 + 8 + 5]


def test_parts_can_take_turns_head_by_head():
  parts = dict.fromkeys("qkv", "H K D -> D H K")
  one = entry(fused("theirs", parts, axis=1, view="(H c) D -> H c D"))
  assert one.shape == (4 * 3 * 8, 6)
  tensor = counted(96, 6)
  v = one.split(tensor)[Piece("v", None)]
  assert v[5, 2, 7] == tensor[2 * 24 + 16 + 7, 5]


def test_llama_cpp_puts_halves_of_a_head_in_pairs():
  (pairs,) = [row for row in GGUF_TABLE if row.theirs == "blk.{i}.attn_q.weight"]
  one = entry(pairs)
  ours = only(one.split(counted(32, 6)))
  # Rows 0, 1, 2, 3, ... of their head are dims 0, 4, 1, 5, ... of ours.
  assert (ours[0, 1] // 6 - 8).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


EVERY_ROW = {
  row.theirs + str(row.parts): row
  for family in FAMILIES
  for row in family.hf.table + family.gguf.table
}


@pytest.mark.parametrize("seed", range(3))
def test_joining_undoes_splitting_for_every_row_of_every_family(seed):
  rng = np.random.default_rng(seed)
  sizes = {letter: int(rng.integers(1, 7)) for letter in "VDHGKFT"}
  sizes["K"] *= 2
  sizes |= {"Z": 2, "P": sizes["K"] // 2}
  for one in EVERY_ROW.values():
    found = entry(one, **sizes)
    tensor = rng.normal(size=found.shape).astype(np.float32)
    parts = found.split(tensor)
    assert sum(part.size for part in parts.values()) == tensor.size
    back = found.join(parts)
    assert back.flags.c_contiguous
    assert np.array_equal(back, tensor), one


def test_a_fused_row_is_not_the_same_in_another_order():
  for table in (PHI3, GPT2, BLOOM):
    (one,) = [row for row in table if "mixer/q" in [part.ours for part in row.parts]]
    parts = (one.parts[1], one.parts[0], *one.parts[2:])
    tensor = counted(*entry(one).shape)
    q = Piece("mixer/q", None)
    other = entry(one._replace(parts=parts)).split(tensor)
    assert not np.array_equal(entry(one).split(tensor)[q], other[q])


def test_a_norm_has_two_rows():
  names = [(row.parts[0].ours, row.theirs) for row in layer_norm("final_norm", "ln_f")]
  assert names == [
    ("final_norm/scale", "ln_f.weight"),
    ("final_norm/bias", "ln_f.bias"),
  ]


def test_tensors_stand_in_the_order_of_the_blocks():
  found = entries(TABLE, MODEL, SHAPES)
  assert [entry.name for entry in found] == ["wte", *(f"h.{i}.q" for i in range(7))]
  pieces = [piece for entry in found[1:] for piece in entry.pieces]
  assert pieces == [
    Piece("prefix_0/mixer/q", None),
    Piece("layers/0/mixer/q", 0),
    Piece("layers/1/mixer/q", 0),
    Piece("layers/0/mixer/q", 1),
    Piece("layers/1/mixer/q", 1),
    Piece("layers/0/mixer/q", 2),
    Piece("layers/1/mixer/q", 2),
  ]


def test_each_block_has_its_own_sizes():
  found = {entry.name: entry.shape for entry in entries(TABLE, MODEL, SHAPES)}
  assert found["wte"] == (7, 6)
  assert found["h.0.q"] == found["h.1.q"] == (32, 6)
  assert found["h.2.q"] == found["h.4.q"] == (8, 6)


def test_positions_have_their_own_letter():
  model = dataclasses.replace(MODEL, positions=Learned(length=9))
  table = (*TABLE, row("embed/positions", "wpe", "T D"))
  found = entries(table, model, SHAPES | {"embed/positions": (9, 6)})
  assert {entry.name: entry.shape for entry in found}["wpe"] == (9, 6)


@pytest.mark.parametrize("name", ["head", "layers/0/mixer/k", "prefix_0/mlp/up"])
def test_a_parameter_without_a_row_is_refused(name):
  message = f"{name}: this file format has no place for the parameter"
  with pytest.raises(InputError, match=message):
    entries(TABLE, MODEL, SHAPES | {name: (7, 6)})


def test_a_fused_row_needs_all_of_its_parts():
  table = (TABLE[0], fused("h.{i}.qk", {"mixer/q": "D", "mixer/k": "D"}, axis=0))
  with pytest.raises(InputError, match="mixer/q: this file format has no place"):
    entries(table, MODEL, SHAPES)


FOUND = {"wte": (7, 6), **{f"h.{i}.q": (32, 6) for i in (0, 1, 3, 5)}}
FOUND |= {f"h.{i}.q": (8, 6) for i in (2, 4, 6)}


def test_the_right_tensors_are_accepted():
  check_tensors(FOUND, entries(TABLE, MODEL, SHAPES), "file")


@pytest.mark.parametrize(
  ("found", "message"),
  [
    ({"h.4.q": None}, r"'h\.4\.q' is missing; the model needs it with shape \(8, 6\)"),
    ({"h.4.q": (32, 6)}, r"'h\.4\.q' has shape \(32, 6\), and .* needs \(8, 6\)"),
    ({"wte": (6, 7)}, r"'wte' has shape \(6, 7\), and the model needs \(7, 6\)"),
    ({"h.7.q": (8, 6)}, r"'h\.7\.q' is not known .* Did you mean 'h\.\d\.q'\?"),
  ],
)
def test_wrong_tensors_are_named(found, message):
  tensors = {name: shape for name, shape in (FOUND | found).items() if shape}
  with pytest.raises(InputError, match=f"^file: the tensor {message}"):
    check_tensors(tensors, entries(TABLE, MODEL, SHAPES), "file")
