"""From a base model to one that does what is wanted of it.

Losses are functions of what the model says of each completion, pair or token: they know
no model, no rows and no devices. Objectives make them tasks of the one training loop.

pairs.py        units of preference, one a slot, and what their losses share
preference.py   pairs against a reference: DPO and its kin
contrastive.py  pairs without a reference: CPO, SimPO, AlphaPO, ORPO
kto.py          single completions, labelled good or bad
reward.py       reward models: Bradley-Terry pairs, labels of the steps of an answer
divergence.py   how far a student's next-token distribution is from its teacher's
distill.py      a teacher's distributions as an objective, in chunks of positions
sequences.py    sums over the sequences that share packed rows
objectives.py   all of these as objectives of the training loop

    losses = dpo(DPO(beta=0.1), Pairs(chosen, rejected, present_BU))
    loss = jnp.sum(losses.loss) / jnp.sum(present_BU)
"""
