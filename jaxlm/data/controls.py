"""What the files beside a tokenizer say of its control tokens: `Controls`.

The names of files and keys are those of Hugging Face's `transformers`, so what `write`
writes other programs read, and what they write `read` reads.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from jaxlm import files
from jaxlm.errors import InputError

CONFIG_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
MODEL_FILE = "config.json"
FILES = (CONFIG_FILE, MAP_FILE, TEMPLATE_FILE, GENERATION_FILE, MODEL_FILE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controls:
  """Control tokens, by their text where it is known and by their id elsewhere."""

  bos_token: str | None = None
  """Begins a document; None: the tokenizer has none."""
  eos_token: str | None = None
  """Ends a document or a turn; None: the first of `eos_ids`."""
  bos_id: int | None = None
  """Begins a document where there is no `bos_token`; None: the end token does."""
  eos_ids: tuple[int, ...] = ()
  """Further ids at which a model stops."""
  add_bos: bool | None = None
  """Whether a text is to be started with bos; None: as the tokenizer itself does."""
  chat_template: str | None = None
  """The Jinja template of a chat."""
  specials: tuple[str, ...] = ()
  """Texts of further control tokens, known to the tokenizer."""
  added: tuple[tuple[str, int], ...] = ()
  """Control tokens that a SentencePiece model lacks, and their ids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ends:
  """The ids that `Controls` come to with a vocabulary."""

  bos: int
  """Begins a document."""
  eos: int
  """Ends a document."""
  stops: frozenset[int]
  """All ids that end a text or a turn."""


def resolve(
  controls: Controls, specials: Mapping[str, int], *, vocab: int, name: str
) -> Ends:
  """Returns the ids at the ends of documents.

  Where a tokenizer has no bos, documents begin with the id that the model's own
  settings call so, and else with the end token: what stood before every document.

  Raises:
    InputError: a token that the vocabulary lacks, or no end token at all.
  """
  eos_ids = list(controls.eos_ids)
  if controls.eos_token is not None:
    eos_ids.insert(0, _id(controls.eos_token, specials, "eos_token", name))
  if not eos_ids:
    raise InputError(
      f"{name}: no end token. Give eos_token in {CONFIG_FILE}, or eos_token_id in "
      f"{GENERATION_FILE}."
    )
  if beyond := [index for index in eos_ids if not 0 <= index < vocab]:
    raise InputError(f"{name}: eos_token_id {beyond[0]} is not below {vocab} ids.")
  bos = eos_ids[0]
  if controls.bos_token is not None:
    bos = _id(controls.bos_token, specials, "bos_token", name)
  elif controls.bos_id in specials.values():
    assert controls.bos_id is not None
    bos = controls.bos_id
  return Ends(bos=bos, eos=eos_ids[0], stops=frozenset(eos_ids))


def _id(token: str, specials: Mapping[str, int], field: str, name: str) -> int:
  if token not in specials:
    raise InputError(f"{name}: the vocabulary lacks {field} {token!r}.")
  return specials[token]


def read(folder: epath.Path) -> Controls:
  """Reads the files of a folder; each of them may be absent.

  Raises:
    InputError: a file that is not JSON, or a field of another type.
  """
  config = _json(folder / CONFIG_FILE)
  named = _json(folder / MAP_FILE)
  model = [config, _json(folder / GENERATION_FILE), _json(folder / MODEL_FILE)]
  eos = [_ids(some, "eos_token_id", folder) for some in model]
  bos = [_ids(some, "bos_token_id", folder) for some in model]
  where = folder / CONFIG_FILE
  tokens = {}
  for key in ("bos_token", "eos_token"):
    token = _token(config[key] if key in config else named.get(key), where, key)
    tokens[key] = token
  add_bos = config.get("add_bos_token")
  if add_bos not in (None, True, False):
    raise InputError(f"{where}: add_bos_token is {add_bos!r}, not true or false.")
  listed = [*_list(config, named, "additional_special_tokens")]
  listed += _list(config, named, "extra_special_tokens")
  return Controls(
    **tokens,
    bos_id=next((ids[0] for ids in bos if ids), None),
    eos_ids=next((ids for ids in eos if ids), ()),
    add_bos=add_bos,
    chat_template=_template(folder, config),
    specials=tuple(
      token for one in listed if (token := _token(one, where, "special token"))
    ),
    added=_added(config, where),
  )


def _list(config: dict, named: dict, key: str) -> list:
  """Returns the control tokens of a key; a mapping holds them by their role."""
  found = config.get(key) or named.get(key) or []
  return list(found.values()) if isinstance(found, dict) else list(found)


def _json(file: epath.Path) -> dict[str, Any]:
  if not file.exists():
    return {}
  try:
    found = json.loads(files.read_text(file))
  except json.JSONDecodeError as error:
    raise InputError(f"{file}: not JSON ({error})") from error
  if not isinstance(found, dict):
    raise InputError(f"{file}: holds {type(found).__name__}, not an object.")
  return found


def _token(value: Any, where: epath.Path, key: str) -> str | None:
  """Returns the text of a token: a string, or an object with `content`."""
  if isinstance(value, dict):
    value = value.get("content")
  if value is None or (isinstance(value, str) and value):
    return value
  raise InputError(f"{where}: {key} is {value!r}, not a token's text.")


def _ids(config: dict, key: str, folder: epath.Path) -> tuple[int, ...]:
  value = config.get(key)
  found = [] if value is None else value if isinstance(value, list) else [value]
  if not all(type(index) is int for index in found):
    raise InputError(f"{folder}: {key} is {value!r}, not an id or a list of ids.")
  return tuple(found)


def _template(folder: epath.Path, config: dict) -> str | None:
  """Returns the template of chats: its own file goes before the config's."""
  if (folder / TEMPLATE_FILE).exists():
    return files.read_text(folder / TEMPLATE_FILE)
  found = config.get("chat_template")
  if found is None or isinstance(found, str):
    return found
  where = f"{folder / CONFIG_FILE}: chat_template"
  try:
    named = {one["name"]: one["template"] for one in found}
  except (TypeError, KeyError) as error:
    raise InputError(
      f"{where} is neither a string nor a list of objects with name and template."
    ) from error
  if "default" not in named:
    raise InputError(f"{where} has {sorted(named)}; one must be called 'default'.")
  return named["default"]


def _added(config: dict, where: epath.Path) -> tuple[tuple[str, int], ...]:
  """Returns the control tokens of `added_tokens_decoder`, {id: {content, special}}."""
  try:
    return tuple(
      (token["content"], int(index))
      for index, token in config.get("added_tokens_decoder", {}).items()
      if token.get("special")
    )
  except (TypeError, KeyError, ValueError, AttributeError) as error:
    raise InputError(
      f"{where}: added_tokens_decoder is not an object of ids and tokens."
    ) from error


def write(controls: Controls, ends: Ends, *, kind: str | None, folder: epath.Path):
  """Writes `tokenizer_config.json`, from which `read` has the same again.

  `kind` is the class that should read the folder elsewhere; None leaves it open.
  """
  config = {
    "tokenizer_class": kind,
    "bos_token": controls.bos_token,
    "eos_token": controls.eos_token,
    "bos_token_id": ends.bos,
    "eos_token_id": [ends.eos, *sorted(ends.stops - {ends.eos})],
    "add_bos_token": controls.add_bos,
    "clean_up_tokenization_spaces": False,
    "chat_template": controls.chat_template,
    "additional_special_tokens": list(controls.specials),
    "added_tokens_decoder": {
      str(index): {"content": token, "special": True} for token, index in controls.added
    },
  }
  kept = {key: value for key, value in config.items() if value not in (None, [], {})}
  files.write_atomic(folder / CONFIG_FILE, json.dumps(kept, indent=2) + "\n")
