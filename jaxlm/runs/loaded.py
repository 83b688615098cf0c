"""A pretrained model ready to write text, for the runs that do nothing else."""

import dataclasses
from typing import Literal, NamedTuple

import jax

from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.unrolled import unroll
from jaxlm.errors import InputError
from jaxlm.interop.checkpoint import open_model
from jaxlm.interop.progress import bar
from jaxlm.interop.registry import changes
from jaxlm.models import count
from jaxlm.models.decoder import Decoder, prefix_of
from jaxlm.models.spec import Precision, for_length
from jaxlm.shapes import PyTree
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout, ShardingRules


class Loaded(NamedTuple):
  """A model, its tokenizer, and how long a text it is set up for."""

  decoder: Decoder
  params: PyTree
  tokenizer: Tokenizer
  length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
  """Where a model is, and how it computes."""

  path: str
  """A Hugging Face folder, a .gguf file, a folder of configs/convert.py, a workdir."""
  compute: Literal["float32", "bfloat16"] | None = None
  """Dtype of the computation; None: float32 on a CPU, bfloat16 elsewhere."""
  tensor: int = 1
  """Devices over which heads, hidden units and vocabulary are split."""

  def load(self, length: int, rows: Literal["one", "many"]) -> Loaded:
    """Loads it for texts of up to `length` tokens, and tells what was loaded.

    Raises:
      InputError: it cannot be loaded, or has no tokenizer.
    """
    opened = open_model(self.path)
    tokenizer = opened.tokenizer()
    if self.tensor > jax.device_count():
      raise InputError(f"tensor: {self.tensor} of {jax.device_count()} devices.")
    devices = jax.devices()[: self.tensor]
    mesh = make_mesh(Mesh(fsdp=1, tensor=self.tensor), devices)
    layout = Layout(mesh, ShardingRules(batch=()))
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    compute = self.compute or ("float32" if on_cpu else "bfloat16")
    length = min(length, opened.model.context or length)
    model = for_length(opened.model, length)
    for line in changes(opened.model, model):
      print(f"for so many tokens: {line}")
    opened = dataclasses.replace(opened, model=model)
    decoder = Decoder(model, Precision(params=opened.dtype, compute=compute), layout)
    with bar("load", opened.model) as tell:
      params = opened.params(decoder, tell)
    parameters = count.parameters(opened.model).total
    print(
      f"{opened.place}: {parameters:,} parameters, {opened.dtype}; computation "
      f"{compute} on {mesh.size} x {mesh.devices.flat[0].device_kind}; up to {length} "
      "tokens"
    )
    ahead = prefix_of(params)
    if ahead:
      print(f"a soft prompt takes {ahead} of the {length} positions")
    # Blocks of a matrix are for one device, and for a CPU's products with a vector.
    blocks = on_cpu and self.tensor == 1 and rows == "one"
    decoder, params = unroll(decoder, params, "one" if blocks else "many")
    twice = ", each matrix twice" if blocks and compute == "float32" else ""
    print(f"layers unrolled{twice}")
    return Loaded(decoder, params, tokenizer, length - ahead)
