import dataclasses

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from interop.goldens import (
  CASES,
  FOLDER,
  GATE,
  assert_same_leaves,
  distance,
  export,
  golden,
  loaded,
  opened,
  read,
  run,
)
from jaxlm.errors import InputError
from jaxlm.interop.checkpoint import Exported, open_model
from jaxlm.interop.gguf import READ, GGUFFile, Type
from jaxlm.models.spec import GQA, RMSNorm, RoPE
from jaxlm.trees import named_leaves

# What llama.cpp has no word for is refused: see test_registry.py.
REFUSED = ["llama-yarn", "mistral", "qwen2-window"]
SAID = [name for name in CASES if name not in REFUSED]


def half(block, at=0):
  return float(block[at : at + 2].view(np.float16)[0])


def signed(byte):
  return int(byte) - 256 if byte > 127 else int(byte)


def f32(block):
  return block.view(np.float32)


def f16(block):
  return [half(block)]


def bf16(block):
  return np.array([0, 0, *block], np.uint8).view(np.float32)


def q8_0(block):
  return [half(block) * signed(byte) for byte in block[2:]]


def q4_0(block):
  low, high = block[2:] & 15, block[2:] >> 4
  return [half(block) * (int(q) - 8) for q in (*low, *high)]


def q4_1(block):
  low, high = block[4:] & 15, block[4:] >> 4
  return [half(block) * int(q) + half(block, 2) for q in (*low, *high)]


def five_bits(high, nibbles):
  """Returns 32 numbers: 4 bits from the nibbles, the fifth from a word of 32."""
  word = int.from_bytes(bytes(high), "little")
  low = [*(nibbles & 15), *(nibbles >> 4)]
  return [int(q) | (word >> i & 1) << 4 for i, q in enumerate(low)]


def q5_0(block):
  return [half(block) * (q - 16) for q in five_bits(block[2:6], block[6:])]


def q5_1(block):
  return [half(block) * q + half(block, 2) for q in five_bits(block[4:8], block[8:])]


def scales_and_minima(block):
  """6 bits for each of eight groups' scale and minimum, in 12 bytes."""
  packed = [int(byte) for byte in block[4:16]]
  scales = [packed[j] & 63 for j in range(4)]
  scales += [packed[8 + j] & 15 | packed[j] >> 6 << 4 for j in range(4)]
  minima = [packed[4 + j] & 63 for j in range(4)]
  minima += [packed[8 + j] >> 4 | packed[4 + j] >> 6 << 4 for j in range(4)]
  d, least = half(block), half(block, 2)
  return [d * scale for scale in scales], [least * minimum for minimum in minima]


def q4_k(block):
  """256 weights, eight groups."""
  scales, minima = scales_and_minima(block)
  found = []
  for group in range(8):
    start = 16 + 32 * (group // 2)
    quants = block[start : start + 32] >> 4 * (group % 2) & 15
    found += [scales[group] * int(q) - minima[group] for q in quants]
  return found


def q5_k(block):
  """256 weights, eight groups; a group's fifth bits are one bit of 32 bytes."""
  scales, minima = scales_and_minima(block)
  found = []
  for group in range(8):
    start = 48 + 32 * (group // 2)
    low = block[start : start + 32] >> 4 * (group % 2) & 15
    quants = low | (block[16:48] >> group & 1) << 4
    found += [scales[group] * int(q) - minima[group] for q in quants]
  return found


def q6_k(block):
  """256 weights, sixteen groups; 4 bits in one place and 2 in another."""
  low, high, scales, d = block[:128], block[128:192], block[192:208], half(block, 208)
  found = []
  for i in range(256):
    part, place = divmod(i, 128)
    quarter, column = divmod(place, 32)
    four = int(low[64 * part + 32 * (quarter % 2) + column]) >> 4 * (quarter // 2) & 15
    two = int(high[32 * part + column]) >> 2 * quarter & 3
    found.append(d * signed(scales[i // 16]) * ((four | two << 4) - 32))
  return found


BLOCKS = {
  Type.F32: f32,
  Type.F16: f16,
  Type.BF16: bf16,
  Type.Q8_0: q8_0,
  Type.Q4_0: q4_0,
  Type.Q4_1: q4_1,
  Type.Q5_0: q5_0,
  Type.Q5_1: q5_1,
  Type.Q4_K: q4_k,
  Type.Q5_K: q5_k,
  Type.Q6_K: q6_k,
}
HALVES = {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}
"""Where float16 stand in a block that no package of Python writes."""


def packed(kind, shape, seed=0):
  """Returns random weights as a file's bytes."""
  rng = np.random.default_rng(seed)
  if kind not in HALVES:
    weights = rng.normal(size=shape).astype(np.float32)
    return gguf.quants.quantize(weights, kind)
  count, size = gguf.GGML_QUANT_SIZES[kind]
  blocks = rng.integers(0, 256, (shape[0], shape[1] // count, size), np.uint8)
  for at in HALVES[kind]:
    scales = rng.uniform(0.001, 0.01, blocks.shape[:2]).astype(np.float16)
    blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
  return blocks.reshape(shape[0], -1)


def unpacked(kind, data):
  """Returns weights, block by block as the format defines them."""
  _, size = gguf.GGML_QUANT_SIZES[kind]
  blocks = np.ascontiguousarray(data).view(np.uint8).reshape(-1, size)
  numbers = [number for block in blocks for number in BLOCKS[kind](block)]
  return np.array(numbers, np.float32).reshape(data.shape[0], -1)


def write(file, tensors, architecture="llama", **metadata):
  """Writes a file with the package's own writer; a tensor is (data, type) or data."""
  writer = gguf.GGUFWriter(str(file), architecture)
  for name, value in metadata.items():
    key = f"{architecture}.{name.replace('__', '.')}"
    (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
  for name, (data, kind) in tensors.items():
    whole = kind in (Type.F32, Type.F16)
    writer.add_tensor(name, data, raw_dtype=None if whole else kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return epath.Path(file)


def test_every_type_that_is_read_is_tested():
  assert set(BLOCKS) == set(READ)


@pytest.mark.parametrize("kind", READ, ids=lambda kind: kind.name)
def test_a_type_is_read_as_its_format_defines(kind, tmp_path):
  data = packed(kind, (3, 512))
  file = GGUFFile(write(tmp_path / "a.gguf", {"some": (data, kind)}))
  assert file.shapes == {"some": (3, 512)}
  assert file.types == f"1 {kind.name}"
  found, wanted = file.read("some"), unpacked(kind, data)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
  assert np.unique(found).size > 10


WIDE = {
  "embedding_length": 256,
  "block_count": 1,
  "feed_forward_length": 512,
  "context_length": 64,
  "attention__head_count": 4,
  "attention__head_count_kv": 2,
  "attention__layer_norm_rms_epsilon": 1e-5,
  "rope__freq_base": 500.0,
}


def wide_tensors():
  """Returns the tensors of a model of one block, in which every type occurs."""
  shapes = {
    "token_embd.weight": ((48, 256), Type.Q8_0),
    "blk.0.attn_q.weight": ((256, 256), Type.Q4_K),
    "blk.0.attn_k.weight": ((128, 256), Type.Q6_K),
    "blk.0.attn_v.weight": ((128, 256), Type.Q4_0),
    "blk.0.attn_output.weight": ((256, 256), Type.Q4_1),
    "blk.0.ffn_gate.weight": ((512, 256), Type.BF16),
    "blk.0.ffn_up.weight": ((512, 256), Type.F16),
    "blk.0.ffn_down.weight": ((256, 512), Type.Q4_K),
    "output.weight": ((48, 256), Type.Q6_K),
  }
  found = {name: (packed(kind, shape), kind) for name, (shape, kind) in shapes.items()}
  ones = np.linspace(0.5, 1.5, 256, dtype=np.float32)
  for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
    found[f"{name}.weight"] = (ones, Type.F32)
  return found


def test_a_model_may_hold_all_types_at_once(tmp_path):
  tensors = wide_tensors()
  file = write(tmp_path / "a.gguf", tensors, **WIDE)
  one = open_model(file)
  assert (one.kind, one.family.name, one.dtype) == ("gguf", "llama", "float32")
  assert one.stored == "1 Q8_0, 2 Q4_K, 2 Q6_K, 1 Q4_0, 1 Q4_1, 1 BF16, 1 F16, 3 F32"
  mixer = one.model.blocks[0].mixer
  positions = RoPE(base=500.0)
  assert mixer == GQA(heads=4, kv_heads=2, head_dim=64, positions=positions)
  assert one.model.final_norm == RMSNorm(eps=1e-5)
  params = named_leaves(read(file))
  for name, ours in (
    ("blk.0.ffn_gate", "layers/0/mlp/gate"),
    ("blk.0.ffn_up", "layers/0/mlp/up"),
    ("blk.0.ffn_down", "layers/0/mlp/down"),
  ):
    data, kind = tensors[f"{name}.weight"]
    np.testing.assert_allclose(
      params[ours][0], unpacked(kind, data).T, rtol=1e-6, atol=1e-7
    )
  assert one.largest_difference(read(file)) == 0


@pytest.mark.parametrize("name", ["llama", "llama-3.1", "smollm2", "mistral-full"])
def test_queries_and_keys_of_a_llama_are_turned_pair_by_pair(name, tmp_path):
  file = GGUFFile(export(name, tmp_path / "a.gguf", "gguf"))
  tensors = {}
  for part in (FOLDER / name).glob("*.safetensors"):
    tensors |= load_file(part)
  mixer = opened(name).model.blocks[0].mixer
  for theirs, ours, heads in (("q", "q", mixer.heads), ("k", "k", mixer.kv_heads)):
    weight = tensors[f"model.layers.1.self_attn.{ours}_proj.weight"]
    halves = weight.reshape(heads, 2, mixer.head_dim // 2, -1)
    pairs = halves.swapaxes(1, 2).reshape(weight.shape)
    assert np.array_equal(file.read(f"blk.1.attn_{theirs}.weight"), pairs)
    assert not np.array_equal(weight, pairs)


@pytest.mark.parametrize("name", ["llama", "llama-3.1", "gemma", "gpt2", "phi3-long"])
def test_logits_of_a_gguf_file_are_those_of_transformers(name, tmp_path):
  file = export(name, tmp_path / "a.gguf", "gguf")
  tokens, wanted = golden(name)
  assert distance(run(open_model(file).model, read(file), tokens), wanted) < GATE


def sayable(model):
  """Returns a model with the numbers that llama.cpp has built in for the Gemmas."""

  def change(block):
    positions, scale = block.mixer.positions, block.mixer.scale
    if scale is not None:
      scale = block.mixer.head_dim**-0.5
      if block.mixer.window is not None:
        positions = dataclasses.replace(positions, base=1e4)
    mixer = dataclasses.replace(block.mixer, positions=positions, scale=scale)
    return dataclasses.replace(block, mixer=mixer)

  prefix, pattern = (tuple(map(change, part)) for part in (model.prefix, model.pattern))
  return dataclasses.replace(model, prefix=prefix, pattern=pattern)


def exported(one, params, target, dtype="float32"):
  model = sayable(one.model)
  Exported(model, one.family, params, None).write(
    target, "gguf", dtype, lambda done: None
  )
  return target


@pytest.mark.parametrize("name", SAID)
def test_what_is_written_is_read_again(name, tmp_path):
  first = exported(opened(name), loaded(name), epath.Path(tmp_path) / "first.gguf")
  one = open_model(first)
  params = read(first)
  if "gemma" not in name:
    assert_same_leaves(params, loaded(name))
    assert one.model == opened(name).model
  else:
    # Norms are stored with one added, so the last bits of small ones are lost.
    assert one.model == sayable(opened(name).model)
    given = named_leaves(loaded(name))
    for leaf_name, leaf in named_leaves(params).items():
      if leaf_name.endswith("norm/scale"):
        np.testing.assert_allclose(leaf, given[leaf_name], rtol=0, atol=2.0**-23)
      else:
        assert np.array_equal(leaf, given[leaf_name])
  second = exported(one, params, epath.Path(tmp_path) / "second.gguf")
  assert_same_leaves(read(second), params)
  assert second.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_has_no_word_for_is_not_written(name, tmp_path):
  with pytest.raises(InputError, match=r"GGUF metadata of .* cannot say all"):
    export(name, tmp_path / "a.gguf", "gguf")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("dtype", "types"),
  [
    ("float32", "21 F32"),
    ("float16", "16 F16, 5 F32"),
    ("bfloat16", "16 BF16, 5 F32"),
    ("q8_0", "14 Q8_0, 2 F16, 5 F32"),
  ],
)
def test_vectors_are_float32_and_matrices_what_was_asked_for(dtype, types, tmp_path):
  file = GGUFFile(export("llama", tmp_path / "a.gguf", "gguf", dtype))
  counts = dict(reversed(part.split()) for part in file.types.split(", "))
  assert counts == dict(reversed(part.split()) for part in types.split(", "))
  # Rows of 40 are no multiple of a block of 32.
  if dtype == "q8_0":
    assert file._tensors["blk.0.ffn_down.weight"].tensor_type == Type.F16


def test_narrow_files_hold_rounded_parameters(tmp_path):
  wide = named_leaves(loaded("gemma"))
  for dtype in ("float16", "bfloat16"):
    file = export("gemma", tmp_path / f"{dtype}.gguf", "gguf", dtype)
    for name, leaf in named_leaves(read(file)).items():
      if not name.endswith("scale"):
        rounded = wide[name].astype(dtype).astype(jnp.float32)
        assert np.array_equal(leaf, rounded), name


def test_eight_bits_are_near(tmp_path):
  file = export("llama", tmp_path / "a.gguf", "gguf", "q8_0")
  wide = named_leaves(loaded("llama"))
  for name, leaf in named_leaves(read(file)).items():
    # A block is rounded to 1/254 of its largest.
    assert np.abs(leaf - wide[name]).max() <= np.abs(wide[name]).max() / 250


def refused(file, message):
  with pytest.raises(InputError, match=f"^{file}: {message}"):
    read(file)


@pytest.fixture
def whole(tmp_path):
  return export("llama", tmp_path / "a.gguf", "gguf")


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.005, 0.01, 0.02, 0.1, 0.5, 0.9, 0.9999])
def test_a_file_that_is_cut_short_is_refused(share, whole):
  data = whole.read_bytes()
  whole.write_bytes(data[: int(len(data) * share)])
  refused(whole, "not a whole GGUF file")


def test_another_kind_of_file_is_refused(whole):
  whole.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
  refused(whole, "not a whole GGUF file")


def test_words_that_are_none_are_refused(whole):
  whole.write_bytes(whole.read_bytes().replace(b"no_vocab", b"no\xff\xfecab"))
  refused(whole, "not a whole GGUF file")


@pytest.mark.parametrize("kind", [Type.Q3_K, Type.IQ4_NL, Type.TQ1_0])
def test_a_type_that_is_not_read_is_refused(kind, tmp_path):
  _, size = gguf.GGML_QUANT_SIZES[kind]
  tensors = wide_tensors()
  blocks = 256 // gguf.GGML_QUANT_SIZES[kind][0]
  tensors["blk.0.attn_q.weight"] = (np.zeros((256, blocks * size), np.uint8), kind)
  file = write(tmp_path / "a.gguf", tensors, **WIDE)
  known = "read are F32, F16, BF16, Q8_0, Q6_K, Q5_K, Q5_1, Q5_0, Q4_K, Q4_1, Q4_0"
  refused(file, f"the tensor 'blk.0.attn_q.weight' is {kind.name}; {known}")


def without(name):
  return {key: value for key, value in wide_tensors().items() if key != name}


@pytest.mark.parametrize(
  ("tensors", "metadata", "message"),
  [
    (
      without("blk.0.ffn_up.weight"),
      {},
      r"the tensor 'blk\.0\.ffn_up\.weight' is missing; the model needs it with shape",
    ),
    (
      without("token_embd.weight"),
      {},
      r"the tensor 'token_embd\.weight' is missing",
    ),
    (
      wide_tensors() | {"blk.0.ffn_more.weight": (np.ones(4, np.float32), Type.F32)},
      {},
      r"the tensor 'blk\.0\.ffn_more\.weight' is not known for this architecture",
    ),
    (
      wide_tensors() | {"output_norm.weight": (np.ones(4, np.float32), Type.F32)},
      {},
      r"the tensor 'output_norm\.weight' has shape \(4,\), .* needs \(256,\)",
    ),
    (
      wide_tensors()
      | {"output_norm.weight": (np.full(256, np.inf, np.float32), Type.F32)},
      {},
      r"the tensor 'output_norm\.weight' has a value that is not finite",
    ),
    (wide_tensors(), {"logit_scale": 2.0}, r"not known .*: llama\.logit_scale"),
    (wide_tensors(), {"attention__head_count_kv": 3}, "kv_heads: 3 does not divide"),
  ],
)
def test_what_does_not_fit_is_refused_by_name(tensors, metadata, message, tmp_path):
  refused(write(tmp_path / "a.gguf", tensors, **WIDE | metadata), message)


def test_an_unknown_architecture_is_refused(tmp_path):
  file = write(tmp_path / "a.gguf", {}, "mamba2")
  refused(file, "the architecture 'mamba2' is not known; known are llama, qwen2")


def test_a_missing_key_is_refused(tmp_path):
  metadata = {key: value for key, value in WIDE.items() if key != "block_count"}
  file = write(tmp_path / "a.gguf", wide_tensors(), **metadata)
  refused(file, r"the key 'llama\.block_count' is missing")
