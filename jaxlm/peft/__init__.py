"""Parameter-efficient tuning: which parameters train, and thin ones beside the others.

filters.py  which matrices and which leaves a choice names
targets.py  what all methods share, and merging
lora.py     LoRA, rsLoRA, DoRA, PiSSA and OLoRA
products.py  VeRA and LoHa
ia3.py      factors of inputs and outputs
many.py     several LoRA adapters: a batch with all of them, or one made of them
soft_prompt.py  prefixes, prompts, P-tuning
bottleneck.py  Houlsby's and parallel adapters
part.py     some of the model's own parameters
methods.py  every method in one table
base.py     the frozen model beside which they train
quantized.py  its matrices in few bits
"""
