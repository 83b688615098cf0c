"""Starting: one process or a pod's many, each knowing the others.

pods.py     how the processes find each other: Cloud TPU, GKE, Slurm, an address
members.py  a run as one of several processes: joined, watched, ended with a word
watch.py    signs of life, so that a lost process is named and none waits for it
chips.py    the table of chips, each figure with its source
xla.py      compiler options by chip
plan.py     targets of --plan: a topology to compile for, on a machine without it
hlo.py      what a compiled program does, loops counted in full
memory.py   what a step needs of a chip's memory, without compiling
threads.py  threads enough for virtual CPU devices
local.py    `jaxlm-local`: several processes on one machine, for rehearsal

    uv run jaxlm-local --processes=4 --config=configs/quickstart.py --workdir=runs/x
"""
