"""Every method of tuning in one table: its spec, and what makes a `Tuning` of it."""

from jaxlm.models.decoder import Decoder
from jaxlm.peft import lora
from jaxlm.peft.lora import LoRA
from jaxlm.peft.targets import Tuning

Adapters = LoRA
"""What trains in place of the whole model."""

METHODS = {LoRA: lora.tuning}


def build(spec: Adapters, decoder: Decoder) -> Tuning:
  """Returns what trains of a model.

  Raises:
    InputError: the spec does not suit the model.
  """
  return METHODS[type(spec)](spec, decoder)
