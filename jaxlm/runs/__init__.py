"""Where the rooms meet: one file a kind of run, each a frozen dataclass with `run`.

train.py    trains a model by an objective, from the first step or a checkpoint
inputs.py   what it reads before: a pretrained model, its text, its tokenizer
begun.py    its state and frozen parameters, as it begins or goes on
fields.py   what its objective wants to know of a frozen model, beside the rows
assembled.py  what a run and its plan share
plan.py     what a run will need, compiled ahead for chips that are not here
reference.py  what a frozen model says of the rows, made once beside the data
teacher.py  opens the teacher of a distillation
sweep.py    many runs, one row each, each done once
together.py  several runs of one shape as one program
samples.py  text that a run writes at its end
initial.py  what such a run takes from a pretrained model
convert.py  a checkpoint from one format to another
score.py    scores of a reward model for the rows of a file
generate.py  prompts of a file to a file of texts
decode.py   one step of decoding, planned or timed
budget.py   size, FLOPs, time, cost and memory of a training, by arithmetic alone
loaded.py   a pretrained model, ready to write text
chat.py     a chat in the terminal
workdir.py  which run a folder belongs to
summary.py  what a run says at its start
"""
