"""Parameter-efficient tuning: which parameters train, and thin ones beside the others.

filters.py  which matrices and which leaves a choice names
targets.py  what all methods share, and merging
lora.py     LoRA, rsLoRA and DoRA
methods.py  every method in one table
"""
