"""One loop for every objective: state, step, optimizers, checkpoints, metrics.

state.py        the one pytree that a step maps to the next, created sharded
objective.py    what a loss is: a numerator, a denominator and metrics
schedules.py    learning rate as a function of the step
optimizers.py   AdamW, Adafactor, Lion, Muon as specs
step.py         the jitted training step, accumulation included
checkpoints.py  Orbax saves with a manifest of our own, verified at restore
fingerprint.py  a hash of weights, the same however they are sharded
metrics.py      jsonl, TensorBoard, loss.png and the progress line
faults.py       Ctrl-C, SIGTERM, values that are not finite
loop.py         the loop, top to bottom in the order things happen
"""
