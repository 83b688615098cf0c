import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.specs import decoder
from safetensors.numpy import load_file, save_file

from interop import ablations
from interop.goldens import (
  CASES,
  GATE,
  assert_same_leaves,
  copied,
  distance,
  edit,
  edit_config,
  export,
  golden,
  loaded,
  opened,
  read,
  run,
  short,
)
from jaxlm.config import differences
from jaxlm.errors import InputError
from jaxlm.interop import hf
from jaxlm.interop.checkpoint import open_model
from jaxlm.models.spec import RoPE
from jaxlm.trees import named_leaves

every_case = pytest.mark.parametrize("name", CASES)
# GELU and its tanh form are within 0.0005 of each other.
FAINT = {"gelu's tanh form": 5}


@every_case
def test_logits_are_those_of_transformers(name):
  tokens, wanted = golden(name)
  windows = [block.mixer.window or 0 for block in opened(name).model.blocks]
  assert tokens.shape[1] > max(windows)
  assert distance(run(opened(name).model, loaded(name), tokens), wanted) < GATE


def test_a_short_context_has_factors_of_its_own():
  tokens, wanted = golden("phi3-long", "golden_short.npz")
  model, params = opened("phi3-long").model, loaded("phi3-long")
  assert distance(run(short(model), params, tokens), wanted) < GATE
  assert distance(run(model, params, tokens), wanted) > 10 * GATE


@every_case
def test_parity_fails_without_any_one_feature(name, monkeypatch):
  tokens, wanted = golden(name)
  true = ablations.flat(opened(name).model)
  params = dataclasses.replace(opened(name), model=true).params(decoder(true))
  touched = set()
  # Each of these models runs once, so none is compiled; and Linen is not to trace every
  # initializer again, to compare shapes.
  monkeypatch.setattr(jax, "eval_shape", lambda *args: ())
  with jax.disable_jit():
    assert distance(run(true, ablations.supplied(true, params), tokens), wanted) < GATE
    for feature, take in ablations.FEATURES.items():
      model = take(true)
      if model == true:
        continue
      changed = run(model, ablations.supplied(model, params), tokens)
      moved = distance(changed, wanted)
      assert moved > FAINT.get(feature, 10) * GATE, f"{feature} moves {moved:.1e}"
      touched |= {line.partition(":")[0] for line in differences(true, model)}
  assert set(ablations.to_be_taken(true)) <= touched


def rolled(name):
  """Yields (parameter and axis, all parameters with one layer of it rolled)."""
  leaves = named_leaves(loaded(name))
  tree = jax.tree.structure(loaded(name))
  for changed, leaf in leaves.items():
    stacked = changed.startswith("layers/")
    for layer in range(leaf.shape[0] if stacked else 1):
      for axis in range(stacked, leaf.ndim):
        if leaf.shape[axis] == 1:
          continue
        one = leaf[layer] if stacked else leaf
        one = jnp.roll(one, 1, axis - stacked)
        other = leaf.at[layer].set(one) if stacked else one
        yield (
          f"{changed}, layer {layer}, axis {axis}",
          jax.tree.unflatten(tree, (leaves | {changed: other}).values()),
        )


@every_case
def test_parity_fails_with_any_part_of_a_parameter_out_of_place(name):
  tokens, wanted = golden(name)
  model = opened(name).model
  turns = isinstance(model.blocks[0].mixer.positions, RoPE)
  for place, params in rolled(name):
    # The same for all keys of a query, so softmax does not see it.
    if not turns and "k_bias" in place:
      continue
    assert distance(run(model, params, tokens), wanted) > 10 * GATE, place


@every_case
def test_parity_fails_with_any_two_parameters_exchanged(name):
  tokens, wanted = golden(name)
  leaves = named_leaves(loaded(name))
  tree = jax.tree.structure(loaded(name))
  pairs = [
    (one, other)
    for one, other in itertools.combinations(leaves, 2)
    if leaves[one].shape == leaves[other].shape
  ]
  assert len(pairs) >= 3
  for one, other in pairs:
    changed = leaves | {one: leaves[other], other: leaves[one]}
    params = jax.tree.unflatten(tree, changed.values())
    moved = distance(run(opened(name).model, params, tokens), wanted)
    assert moved > 10 * GATE, (one, other)


@every_case
def test_many_files_hold_the_same_as_one(name, tmp_path, monkeypatch):
  monkeypatch.setattr(hf, "SHARD_BYTES", 30_000)
  target = export(name, tmp_path / "out", "hf")
  files = sorted(file.name for file in target.iterdir())
  count = sum(file.endswith(".safetensors") for file in files)
  assert count > 1
  names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
  assert files == sorted(["config.json", hf.INDEX, *names])
  index = json.loads((target / hf.INDEX).read_text())
  held = {file: load_file(target / file) for file in names}
  for tensor, file in index["weight_map"].items():
    assert tensor in held[file]
  every = [array for tensors in held.values() for array in tensors.values()]
  assert len(every) == len(index["weight_map"])
  assert index["metadata"]["total_size"] == sum(array.nbytes for array in every)
  # Each is as full as it can be: the next one's first tensor would not fit.
  for one, after in itertools.pairwise(names):
    first = next(
      tensor for tensor, file in index["weight_map"].items() if file == after
    )
    size = sum(array.nbytes for array in held[one].values())
    assert size + held[after][first].nbytes > 30_000
    assert size <= 30_000 or len(held[one]) == 1
  assert open_model(target).model == opened(name).model
  assert_same_leaves(read(target), loaded(name))


def test_one_file_is_written_where_it_is_enough(tmp_path):
  target = export("qwen3", tmp_path / "out", "hf")
  assert {file.name for file in target.iterdir()} == {"config.json", hf.SINGLE}
  written, given = (
    load_file(place / hf.SINGLE) for place in (target, opened("qwen3").place)
  )
  assert written.keys() == given.keys()
  for name, array in given.items():
    assert np.array_equal(written[name], array)


@pytest.mark.parametrize(
  ("dtype", "stored", "kept"),
  [
    ("float32", "F32", "float32"),
    ("bfloat16", "BF16", "bfloat16"),
    ("float16", "F16", "float32"),
  ],
)
def test_dtypes_are_told_and_rounded_to(dtype, stored, kept, tmp_path):
  target = export("llama", tmp_path / "out", "hf", dtype)
  assert (open_model(target).dtype, open_model(target).stored) == (kept, stored)
  wide = named_leaves(loaded("llama"))
  for name, leaf in named_leaves(read(target)).items():
    assert np.array_equal(leaf, wide[name].astype(dtype).astype(jnp.float32)), name


@pytest.mark.parametrize("name", ["gpt2", "bloom", "llama", "gemma2"])
def test_names_of_older_files_have_no_prefix(name, tmp_path):
  prefix = opened(name).family.hf.prefix

  def strip(tensors):
    for tensor in list(tensors):
      if tensor.startswith(prefix):
        tensors[tensor.removeprefix(prefix)] = tensors.pop(tensor)

  folder = copied(name, tmp_path)
  edit(folder, strip)
  assert_same_leaves(read(folder), loaded(name))


def test_buffers_of_older_files_are_no_parameters(tmp_path):
  mask = np.tril(np.ones((1, 1, 40, 40), np.bool_))

  def add(tensors):
    for i in range(2):
      tensors[f"transformer.h.{i}.attn.bias"] = mask
      tensors[f"transformer.h.{i}.attn.masked_bias"] = np.float32(-1e4).reshape(1)

  folder = copied("gpt2", tmp_path / "gpt2")
  edit(folder, add)
  assert_same_leaves(read(folder), loaded("gpt2"))

  def add_frequencies(tensors):
    for i in range(2):
      name = f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
      tensors[name] = np.ones(8, np.float32)

  folder = copied("llama", tmp_path / "llama")
  edit(folder, add_frequencies)
  assert_same_leaves(read(folder), loaded("llama"))


TIED = [name for name in CASES if opened(name).model.head == "tied"]


def table_of(name):
  """Returns what the family calls its embedding."""
  (row,) = [r for r in opened(name).family.hf.table if r.parts[0].ours == "embed/table"]
  return row.theirs


@pytest.mark.parametrize("name", TIED)
def test_a_stored_copy_of_a_tied_head_is_not_needed_and_must_be_one(name, tmp_path):
  folder = copied(name, tmp_path)
  edit(folder, lambda t: t.update({"lm_head.weight": t[table_of(name)].copy()}))
  assert_same_leaves(read(folder), loaded(name))

  def change(tensors):
    tensors["lm_head.weight"][3, 5] += 1

  edit(folder, change)
  message = "'lm_head.weight' differs from .*, and tie_word_embeddings says"
  with pytest.raises(InputError, match=f"^{tmp_path}: the tensor {message}"):
    read(folder)


def refused(folder, message):
  with pytest.raises(InputError, match=f"^{folder}.*{message}"):
    read(folder)


@pytest.mark.parametrize("size", [0, 4, 20, -10, -2000])
def test_a_file_that_is_cut_short_is_refused(size, tmp_path):
  folder = copied("llama", tmp_path)
  file = folder / hf.SINGLE
  file.write_bytes(file.read_bytes()[:size])
  refused(folder, r"model\.safetensors: not a whole safetensors file")


def test_another_kind_of_file_is_refused(tmp_path):
  folder = copied("llama", tmp_path)
  (folder / hf.SINGLE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
  refused(folder, r"model\.safetensors: not a whole safetensors file")


def test_no_weights_are_refused(tmp_path):
  folder = copied("llama", tmp_path)
  (folder / hf.SINGLE).unlink()
  refused(folder, r"has neither model\.safetensors nor model\.safetensors\.index\.json")


SHARD = "model-00002-of-00004.safetensors"


def test_a_missing_file_of_several_is_refused(tmp_path):
  folder = copied("llama-3.1", tmp_path)
  (folder / SHARD).unlink()
  refused(folder, f"{SHARD}: is missing, and {hf.INDEX} names it")


def test_a_file_of_several_that_is_cut_short_is_refused(tmp_path):
  folder = copied("llama-3.1", tmp_path)
  (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1])
  refused(folder, f"{SHARD}: not a whole safetensors file")


def test_a_file_without_what_the_index_says_is_refused(tmp_path):
  folder = copied("llama-3.1", tmp_path)
  tensors = load_file(folder / SHARD)
  name, array = tensors.popitem()
  save_file(tensors, folder / SHARD)
  refused(folder, f"{SHARD}: by {hf.INDEX}, the tensor '{name}' is not in it")
  save_file(tensors | {name: array, "more": array}, folder / SHARD)
  refused(folder, f"{SHARD}: by {hf.INDEX}, the tensor 'more' is in it and not in the")


def test_a_tensor_that_the_index_lacks_is_refused(tmp_path):
  folder = copied("llama-3.1", tmp_path)
  index = json.loads((folder / hf.INDEX).read_text())
  file = index["weight_map"].pop("model.norm.weight")
  (folder / hf.INDEX).write_text(json.dumps(index))
  refused(folder, rf"{file}: by {hf.INDEX}, the tensor 'model\.norm\.weight' is in it")


def test_an_index_that_is_none_is_refused(tmp_path):
  folder = copied("llama-3.1", tmp_path)
  (folder / hf.INDEX).write_text("{")
  refused(folder, rf"{hf.INDEX}: not JSON")
  for text in ("{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'):
    (folder / hf.INDEX).write_text(text)
    refused(folder, rf"{hf.INDEX}: has no weight_map, from tensors to files")
  (folder / hf.INDEX).write_text('{"weight_map": {}}')
  refused(folder, r"the tensor 'model\.embed_tokens\.weight' is missing")


QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda t: t.pop(QUERY),
      rf"the tensor '{QUERY}' is missing; the model needs it with shape \(64, 32\)",
    ),
    (
      lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[QUERY]}),
      r"'model\.layers\.2\.mlp\.up_proj\.weight' is not known .* Did you mean 'model",
    ),
    (
      lambda t: t.update({QUERY: t[QUERY].T.copy()}),
      rf"'{QUERY}' has shape \(32, 64\), and the model needs \(64, 32\)",
    ),
    (
      lambda t: t.update({QUERY: t[QUERY].astype(np.int8)}),
      rf"model\.safetensors: the tensor '{QUERY}' is I8; read are F64, F32, F16, BF16",
    ),
  ],
)
def test_wrong_tensors_are_refused_by_name(change, message, tmp_path):
  folder = copied("llama", tmp_path)
  edit(folder, change)
  refused(folder, message)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_values_that_are_not_finite_are_refused(value, dtype, tmp_path):
  folder = copied("llama", tmp_path)
  dtype = jnp.dtype(dtype)
  edit(folder, lambda t: t.update({QUERY: t[QUERY].astype(dtype)}))
  read(folder)
  edit(folder, lambda t: t[QUERY].__setitem__((-1, -1), value))
  refused(folder, rf"the tensor '{QUERY}' has a value that is not finite")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "llama4"}, "architecture 'llama4' is not known; .* mean 'llama'"),
    ({"model_type": None}, "architecture 'None' is not known"),
    (
      {"architectures": ["LlamaForSequenceClassification"]},
      r"architectures=\['LlamaForSequenceClassification'\]: of the type llama only "
      "LlamaForCausalLM, a language model, is read",
    ),
    ({"quantization_config": {"bits": 4}}, "quantization_config: quantized weights"),
  ],
)
def test_what_is_no_model_of_a_known_kind_is_refused(changes, message, tmp_path):
  folder = copied("llama", tmp_path)
  edit_config(folder, **changes)
  refused(folder, rf"config\.json: .*{message}")


def test_an_architecture_need_not_be_told(tmp_path):
  folder = copied("llama", tmp_path)
  edit_config(folder, architectures=None)
  assert open_model(folder).model == opened("llama").model


@pytest.mark.parametrize(
  ("text", "message"),
  [("{", "not JSON"), ("[]", "not a JSON object"), (None, "does not exist")],
)
def test_a_config_that_is_none_is_refused(text, message, tmp_path):
  folder = copied("llama", tmp_path)
  (folder / "config.json").unlink()
  if text is not None:
    (folder / "config.json").write_text(text)
  refused(folder, rf"config\.json: {message}")
