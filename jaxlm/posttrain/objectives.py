"""Preferences, labels and rewards as objectives of the one training loop.

The examples of a batch are pairs or single completions packed into rows; see
`sequences`. Losses themselves stand in `preference` and `reward`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.data import conversations, sources
from jaxlm.data.spec import Data
from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder, head_weight
from jaxlm.models.spec import LM
from jaxlm.ops.losses import LossShape, log_probs
from jaxlm.posttrain import distill, reward
from jaxlm.posttrain import pairs as preference
from jaxlm.posttrain.contrastive import Contrastive, contrastive
from jaxlm.posttrain.distill import Distill
from jaxlm.posttrain.kto import KTO, kl_baseline, kto
from jaxlm.posttrain.pairs import Losses, Pairs
from jaxlm.posttrain.preference import DPO, dpo
from jaxlm.posttrain.sequences import Slots, completions, spoken, transposed
from jaxlm.shapes import Array, PyTree
from jaxlm.training.objective import Batch, Field, NextToken, Ratio, Sums, Task, Terms
from jaxlm.training.objective import next_token as make_next_token

REFERENCE = "reference"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference:
  """Learns from pairs of a chosen and a rejected completion."""

  loss: DPO | Contrastive = dataclasses.field(default_factory=DPO)
  """Which loss; those of DPO's kind need log-probabilities under a reference."""
  chunk: int = 128
  """Positions of each row whose logits are held at a time."""

  def __post_init__(self):
    _check_chunk(self.chunk)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unpaired:
  """Learns from completions that are labelled good or bad (KTO and kin)."""

  loss: KTO = dataclasses.field(default_factory=KTO)
  """Which loss."""
  chunk: int = 128
  """Positions of each row whose logits are held at a time."""

  def __post_init__(self):
    _check_chunk(self.chunk)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
  """Learns a score of completions from pairs (Bradley-Terry)."""

  loss: reward.BradleyTerry = dataclasses.field(default_factory=reward.BradleyTerry)
  """Margins and centering."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReward:
  """Learns whether each step of a completion is good (a process reward model)."""


Spec = NextToken | Distill | Preference | Unpaired | Reward | StepReward


def _check_chunk(chunk: int) -> None:
  if chunk < 1:
    raise InputError(f"objective.chunk: {chunk} is not positive.")


def build(
  spec: Spec, decoder: Decoder, examples: int, teacher: distill.Teacher | None = None
) -> Task:
  """Returns the task of a spec; rows hold at most `examples` examples."""
  match spec:
    case Distill():
      assert teacher is not None
      return distill.task(spec, decoder, teacher)
    case NextToken():
      return Task(make_next_token(spec, decoder))
    case Preference():
      return _preference(spec, decoder, examples)
    case Unpaired():
      return _unpaired(spec, decoder, examples)
    case Reward():
      return _reward(spec, decoder, examples)
    case StepReward():
      return _step_reward(decoder)


def chunk_of(spec: Spec) -> int:
  """Returns the positions of a row whose logits are held at a time; 0: it has none."""
  return 0 if isinstance(spec, Reward | StepReward) else spec.chunk


def needs_reference(spec: Spec) -> bool:
  """Says whether an objective takes log-probabilities under a reference."""
  match spec:
    case Preference(loss=loss):
      return isinstance(loss, DPO) and any(kind != "sft" for kind, _ in loss.losses)
    case Unpaired():
      return True
    case _:
      return False


SOURCES: dict[type, tuple[Any, ...]] = {
  NextToken: (sources.Source, conversations.Chats),
  Distill: (sources.Source, conversations.Chats),
  Preference: (conversations.Preferences,),
  Unpaired: (conversations.Labelled,),
  Reward: (conversations.Preferences,),
  StepReward: (conversations.Stepwise,),
}
"""What each objective learns from."""
SCORES: dict[type, int] = {Reward: 1, StepReward: 2}
"""Outputs of the head for scores."""


def check(spec: Spec, data: Data, model: LM, micro_batches: int) -> None:
  """Raises InputError where an objective does not go with the rest of a run."""
  name, wanted = type(spec).__name__, SOURCES[type(spec)]
  for index, weighted in enumerate(data.sources):
    if not isinstance(weighted.source, wanted):
      kinds = [getattr(kind, "__name__", "text") for kind in wanted]
      raise InputError(
        f"data.sources.{index}.source: {type(weighted.source).__name__} is not what "
        f"objective={name} learns from, which is {' or '.join(kinds)}."
      )
    source = weighted.source
    margins = isinstance(source, conversations.Preferences) and source.margins
    if isinstance(spec, Reward) and spec.loss.margin and not margins:
      raise InputError(
        f"data.sources.{index}.source.margins: false, but objective.loss.margin takes "
        f"each row's margin. Set data.sources.{index}.source.margins=true first."
      )
  if data.even and not isinstance(spec, NextToken | Distill):
    raise InputError(f"data.even: objective={name} has no weights of tokens.")
  if isinstance(spec, Unpaired) and data.sequences != (2 if _has_kl(spec) else 1):
    raise InputError(
      f"data.sources.0.source.kl: {not _has_kl(spec)}, but {spec.loss.method!r} needs "
      f"kl={_has_kl(spec)}."
    )
  if model.scores != SCORES.get(type(spec)):
    raise InputError(
      f"model.scores: {model.scores}; objective={name} needs {SCORES.get(type(spec))}."
    )
  reason = _whole_batch(spec)
  if reason is not None and micro_batches > 1:
    raise InputError(
      f"accumulate: {micro_batches}, but {reason}, so it must be 1 for this loss."
    )


def _has_kl(spec: Unpaired) -> bool:
  return spec.loss.method == "kto"


def _whole_batch(spec: Spec) -> str | None:
  """Says why an objective cannot be split into micro-batches, where it cannot."""
  if isinstance(spec, Preference) and isinstance(spec.loss, DPO):
    for kind, _ in spec.loss.losses:
      if kind.startswith("aot"):
        return f"{kind} sorts all pairs of a batch"
  return None


def target_log_probs(decoder: Decoder, chunk: int, params: PyTree, batch: Batch):
  """Returns the log-probabilities of a batch's targets."""
  shape = LossShape(decoder.layout, chunk, softcap=decoder.spec.softcap)
  x_BTD, _ = decoder.apply(
    {"params": params}, batch["tokens"], batch["positions"], batch["segments"]
  )
  head_DV = head_weight(decoder.spec, params)
  return log_probs(shape, x_BTD, head_DV, batch["targets"])


def reference(decoder: Decoder, chunk: int, params: PyTree, batch: Batch):
  """Returns the fields of a batch that objectives take of a reference."""
  return {REFERENCE: target_log_probs(decoder, chunk, params, batch).target_BT}


def _preference(spec: Preference, decoder: Decoder, examples: int) -> Task:
  loss = spec.loss
  tail = loss.length_tail if isinstance(loss, DPO) else None
  sft = loss.sft_weight if isinstance(loss, DPO) else loss.nll
  whole = isinstance(loss, Contrastive) and loss.nll_over == "sequence"
  fields = (Field(REFERENCE),) if needs_reference(spec) else ()

  def counts(slots: Slots, batch: Batch) -> Sums:
    """Pairs, and the tokens of the chosen ones that the NLL is over."""
    present_BU = _present(slots, batch)
    told_BT = spoken(batch) if whole else _mask(batch)
    chosen_BU = slots.sums(told_BT)[:, :, 0]
    return {"pairs": jnp.sum(present_BU), "tokens": jnp.sum(chosen_BU)}

  def shared(params: PyTree, batch: Batch) -> Sums:
    del params
    return counts(Slots.of(batch["segments"], examples, 2), batch)

  def objective(params: PyTree, batch: Batch, rng: Array) -> Terms:
    del rng
    slots = Slots.of(batch["segments"], examples, 2)
    found = target_log_probs(decoder, spec.chunk, params, batch)
    both = completions(slots, batch, found, reference=bool(fields), tail=tail)
    present_BU = _present(slots, batch)
    pairs = Pairs(transposed(both, 0), transposed(both, 1), present_BU)
    if isinstance(loss, DPO):
      losses = dpo(loss, pairs)
    else:
      losses = contrastive(loss, pairs)
    terms = _terms(losses, present_BU)
    if not sft:
      return terms
    told_BT = spoken(batch) if whole else _mask(batch)
    nll = -jnp.sum(slots.sums(found.target_BT * told_BT)[:, :, 0])
    # A mean over tokens beside one over pairs: scaled by what the whole batch has, so
    # that micro-batches add up to it.
    all_of_it = batch["shared"] if "shared" in batch else counts(slots, batch)
    scale = all_of_it["pairs"] / all_of_it["tokens"]
    here = counts(slots, batch)["tokens"]
    metrics = terms.metrics | {"nll_chosen": Ratio(nll, here)}
    return Terms(terms.numerator + sft * scale * nll, terms.denominator, metrics)

  return Task(objective, shared if sft else None, fields)


def _unpaired(spec: Unpaired, decoder: Decoder, examples: int) -> Task:
  loss = spec.loss
  sequences = 2 if _has_kl(spec) else 1

  def look(params: PyTree, batch: Batch):
    slots = Slots.of(batch["segments"], examples, sequences)
    found = target_log_probs(decoder, spec.chunk, params, batch)
    return slots, completions(slots, batch, found, reference=True)

  def baseline(slots: Slots, batch: Batch, sums: preference.Sums) -> Sums:
    """Log-ratios of the mismatched completions, which estimate the divergence."""
    other = transposed(sums, 1)
    present_BU = _present(slots, batch)
    ratio_BU = jax.lax.stop_gradient(other.policy - other.reference)
    return {"ratio": jnp.sum(ratio_BU * present_BU), "count": jnp.sum(present_BU)}

  def shared(params: PyTree, batch: Batch) -> Sums:
    slots, sums = look(jax.lax.stop_gradient(params), batch)
    return baseline(slots, batch, sums)

  def objective(params: PyTree, batch: Batch, rng: Array) -> Terms:
    del rng
    slots, sums = look(params, batch)
    own, present_BU = transposed(sums, 0), _present(slots, batch)
    kl = jnp.zeros((), jnp.float32)
    if sequences == 2:
      over = batch["shared"] if "shared" in batch else baseline(slots, batch, sums)
      kl = kl_baseline(over["ratio"], over["count"])
    label_BU = slots.first(batch["values"])
    losses = kto(loss, own.policy, own.reference, label_BU, present_BU, kl)
    good_BU = losses.metrics.pop("desirable")
    terms = _terms(losses, present_BU)
    count, good = terms.denominator, jnp.sum(good_BU * present_BU)
    counts = {"chosen": good, "rejected": count - good}
    metrics = {
      name: Ratio(ratio.numerator, counts.get(name.split("_")[-1], count))
      for name, ratio in terms.metrics.items()
    }
    return terms._replace(metrics=metrics | {"kl": Ratio(kl * count, count)})

  return Task(objective, shared if sequences == 2 else None, (Field(REFERENCE),))


def _reward(spec: Reward, decoder: Decoder, examples: int) -> Task:
  def objective(params: PyTree, batch: Batch, rng: Array) -> Terms:
    del rng
    slots = Slots.of(batch["segments"], examples, 2)
    present_BU = _present(slots, batch)
    scores_BT = scores(decoder, params, batch)[:, :, 0]
    sums_BUK = slots.sums(scores_BT * ends(batch["segments"]))
    margin_BU = slots.first(batch["values"])
    losses = reward.bradley_terry(
      spec.loss, sums_BUK[:, :, 0], sums_BUK[:, :, 1], margin_BU, present_BU
    )
    return _terms(losses, present_BU)

  return Task(objective)


def _step_reward(decoder: Decoder) -> Task:
  def objective(params: PyTree, batch: Batch, rng: Array) -> Terms:
    del rng
    scores_BTC = scores(decoder, params, batch)
    ends_BT = (batch["labels"] >= 0) & (batch["segments"] > 0)
    mask_BT = ends_BT.astype(jnp.float32)
    labels_BT = jnp.maximum(batch["labels"], 0)
    loss_BT = reward.stepwise(scores_BTC, labels_BT, mask_BT)
    steps = jnp.sum(mask_BT)
    right_BT = jnp.argmax(scores_BTC, axis=-1) == labels_BT
    correct = jnp.sum(jnp.where(right_BT, mask_BT, 0.0))
    return Terms(jnp.sum(loss_BT), steps, {"accuracy": Ratio(correct, steps)})

  return Task(objective)


def scores(decoder: Decoder, params: PyTree, batch: Batch) -> Array:
  """Returns the score head's outputs at each input token, [B, T, C] float32."""
  x_BTD, _ = decoder.apply(
    {"params": params}, batch["tokens"], batch["positions"], batch["segments"]
  )
  head_DC = params["score"].astype(x_BTD.dtype)
  return jnp.einsum("BTD,DC->BTC", x_BTD, head_DC, preferred_element_type=jnp.float32)


def ends(segments_BT: Array) -> Array:
  """Returns 1.0 at the last token of each sequence."""
  following_BT = jnp.pad(segments_BT[:, 1:], ((0, 0), (0, 1)))
  last_BT = (segments_BT != following_BT) & (segments_BT > 0)
  return last_BT.astype(jnp.float32)


def _mask(batch: Batch) -> Array:
  return (batch["weights"] > 0).astype(jnp.float32)


def _present(slots: Slots, batch: Batch) -> Array:
  """Returns 1.0 for each example that a row holds, [B, U]."""
  length_BUK = slots.sums(_mask(batch))
  return (length_BUK[:, :, 0] > 0).astype(jnp.float32)


def _terms(losses: Losses, present_BU: Array) -> Terms:
  count = jnp.sum(present_BU)
  metrics = {
    name: Ratio(jnp.sum(values_BU * present_BU), count)
    for name, values_BU in losses.metrics.items()
  }
  return Terms(jnp.sum(losses.loss), count, metrics)
