"""Parameter-efficient tuning: which parameters train, and thin ones beside the others.

filters.py  which matrices and which leaves a choice names
targets.py  what all methods share, and merging
lora.py     LoRA, rsLoRA and DoRA
part.py     some of the model's own parameters
methods.py  every method in one table
base.py     the frozen model beside which they train
quantized.py  its matrices in few bits
"""
