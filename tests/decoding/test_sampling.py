import dataclasses

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.decoding.sampling import Sampling, controls, possible
from jaxlm.errors import InputError

V = 6
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"temperature": -0.1}, "temperature: -0.1 is not 0 .greedy. or between"),
    ({"temperature": 1e-9}, "temperature: 1e-09"),
    ({"temperature": NAN}, "temperature: nan"),
    ({"temperature": INF}, "temperature: inf"),
    ({"top_k": 0}, "top_k: 0"),
    ({"top_k": 2.5}, "top_k: 2.5"),
    ({"top_k": True}, "top_k: True"),
    ({"top_p": 0.0}, "top_p: 0.0"),
    ({"top_p": 1.1}, "top_p: 1.1"),
    ({"top_p": NAN}, "top_p: nan"),
    ({"min_p": -0.1}, "min_p: -0.1"),
    ({"min_p": 1.1}, "min_p: 1.1"),
    ({"typical_p": 0.0}, "typical_p: 0.0"),
    ({"typical_p": 1.5}, "typical_p: 1.5"),
    ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0"),
    ({"repetition_penalty": -1.0}, "repetition_penalty: -1.0"),
    ({"presence_penalty": INF}, "presence_penalty: inf"),
    ({"frequency_penalty": NAN}, "frequency_penalty: nan"),
    ({"logit_bias": ((1, -INF),)}, "logit_bias: .*inf"),
    ({"logit_bias": ((1, 2.0), (1, 3.0))}, "logit_bias: a token is there twice"),
    ({"logit_bias": ((-1, 2.0),)}, "logit_bias: -1 is not a token id"),
    ({"allowed": ()}, r"allowed: of \[\] none is left"),
    ({"allowed": (1, 2), "banned": (2, 1, 3)}, r"allowed: of \[1, 2\] none is left"),
    ({"allowed": (1.0,)}, "allowed: 1.0 is not a token id"),
    ({"banned": (1, 1)}, "banned: a token is there twice"),
    ({"min_tokens": -1}, "min_tokens: -1"),
    ({"min_tokens": 2**31}, "min_tokens: 2147483648"),
    ({"seed": -1}, "seed: -1"),
    ({"seed": 2**64}, "seed: 18446744073709551616"),
  ],
)
def test_what_no_sampling_can_be(fields, message):
  with pytest.raises(InputError, match=message):
    Sampling(**fields)


def test_no_field_is_forgotten_above():
  """A new field needs a look at what it cannot be."""
  assert len(dataclasses.fields(Sampling)) == 13


@pytest.mark.parametrize(
  ("fields", "stops", "message"),
  [
    ({"logit_bias": ((V, 1.0),)}, (), "row 1: logit_bias: token 6 .* vocabulary of 6"),
    ({"allowed": (0, V)}, (), "row 1: allowed: token 6"),
    ({"banned": (V,)}, (), "row 1: banned: token 6"),
    ({"banned": tuple(range(V))}, (), "row 1: .*no token is left"),
    ({"allowed": (2, 3), "min_tokens": 1}, (2, 3), "row 1: .*no token is left"),
    ({"banned": (0, 1, 2, 3), "min_tokens": 1}, (4, 5), "row 1: .*no token is left"),
  ],
)
def test_what_a_batch_cannot_be(fields, stops, message):
  with pytest.raises(InputError, match=message):
    controls([Sampling(), Sampling(**fields)], V, stops=stops)


def test_a_batch_has_rows_and_a_seed():
  with pytest.raises(InputError, match="samplings: there is none"):
    controls([], V)
  with pytest.raises(InputError, match="seed: -1"):
    controls([Sampling()], V, seed=-1)


def test_stops_are_held_back_only_for_min_tokens():
  made = controls([Sampling(allowed=(2, 3))], V, stops=(2, 3))
  assert made.stops_BV is made.min_tokens_B is None


def test_what_is_possible():
  one = Sampling(allowed=(1, 2, 3), banned=(2,))
  assert np.flatnonzero(possible(one, V)).tolist() == [1, 3]
  assert np.flatnonzero(possible(one, V, stops=(3, 99))).tolist() == [1]


def test_fields_without_effect_are_not_in_the_structure():
  neutral = Sampling(
    top_k=V,
    top_p=1.0,
    min_p=0.0,
    typical_p=1.0,
    repetition_penalty=1,
    presence_penalty=-0.0,
    logit_bias=(),
  )
  for one in (neutral, Sampling()):
    made = controls([one, one], V, stops=(0,))
    assert [name for name, leaf in made._asdict().items() if leaf is not None] == [
      "key_B2"
    ]
  # Of a greedy row the likeliest token is asked alone.
  greedy = controls([Sampling(temperature=0, top_k=2, top_p=0.5, min_p=0.5)], V)
  assert [name for name, leaf in greedy._asdict().items() if leaf is not None] == [
    "greedy_B"
  ]


def test_every_leaf_leads_with_rows():
  full = Sampling(
    temperature=0.5,
    top_k=2,
    top_p=0.5,
    min_p=0.1,
    typical_p=0.5,
    repetition_penalty=2.0,
    presence_penalty=1.0,
    frequency_penalty=1.0,
    logit_bias=((1, 1.0),),
    min_tokens=1,
  )
  made = controls([full, Sampling(temperature=0), full], V)
  assert made.mask_BV is None
  leaves = jax.tree.leaves(made)
  assert len(leaves) == len(made) - 1
  assert {leaf.shape[0] for leaf in leaves} == {3}


def test_fields_are_read_by_configs():
  """From the command line, as chat.py and train.py have them."""
  made = config.override(
    Sampling(),
    ["logit_bias=((3,1.5),(4,-1))", "allowed=(3,4)", "min_p=0.1", "seed=7"],
  )
  assert made == Sampling(
    logit_bias=((3, 1.5), (4, -1.0)), allowed=(3, 4), min_p=0.1, seed=7
  )
