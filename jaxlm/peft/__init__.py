"""Parameter-efficient tuning: which parameters train, and thin ones beside the others.

filters.py  which matrices and which leaves a choice names
lora.py     LoRA, rsLoRA and DoRA: specs, first values, leaves, merging
"""
