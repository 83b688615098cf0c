"""Every method of tuning in one table: its spec, and what makes a `Tuning` of it."""

from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder
from jaxlm.peft import bottleneck, ia3, lora, part, products, soft_prompt
from jaxlm.peft.bottleneck import Bottleneck
from jaxlm.peft.ia3 import IA3
from jaxlm.peft.lora import LoRA
from jaxlm.peft.part import Part
from jaxlm.peft.products import LoHa, VeRA
from jaxlm.peft.soft_prompt import Prefix, Prompt, PTuning
from jaxlm.peft.targets import Tuning, joined
from jaxlm.shapes import Array, PyTree
from jaxlm.trees import named_leaves

Adapters = LoRA | IA3 | VeRA | LoHa | Part | Prefix | Prompt | PTuning | Bottleneck
"""What trains in place of the whole model."""

METHODS = {
  LoRA: lora.tuning,
  IA3: ia3.tuning,
  VeRA: products.vera,
  LoHa: products.loha,
  Part: part.tuning,
  Prefix: soft_prompt.tuning,
  Prompt: soft_prompt.tuning,
  PTuning: soft_prompt.tuning,
  Bottleneck: bottleneck.tuning,
}


def build(spec: Adapters, also: tuple[str, ...], decoder: Decoder) -> Tuning:
  """Returns what trains of a model: by a method, and whole what `also` names.

  Raises:
    InputError: the spec does not suit the model, or both are for one parameter.
  """
  tuning = METHODS[type(spec)](spec, decoder)
  if not also:
    return tuning
  beside = part.tuning(Part(train=also), decoder, "also")
  is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
  for name in named_leaves(beside.axes, is_axes):
    if any(f"{n}/".startswith(f"{name}/") for n in named_leaves(tuning.axes, is_axes)):
      raise InputError(f"also: {name} has adapters; it cannot train whole as well.")

  def init(base: PyTree, key: Array) -> PyTree:
    return joined(tuning.init(base, key), beside.init(base, key))

  def attach(base: PyTree, trained: PyTree, key: Array | None) -> PyTree:
    return tuning.attach(beside.attach(base, trained, None), trained, key)

  return Tuning(joined(tuning.axes, beside.axes), init, attach, tuning.prepare)
