"""The tokenizer of a published folder, and its files for a model that is exported."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.tokenizer import TokenizerFile

SETTINGS = 'tokenizer_config.json'
TEMPLATE = 'chat_template.jinja'


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the object in a JSON file.

  Raises:
    ConfigError: there is no such file, or it is something else.
  """
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise ConfigError(f'{path}: {error.strerror}') from error
  except ValueError as error:
    raise ConfigError(f'{path}: is no JSON: {error}') from error
  if not isinstance(found, dict):
    raise ConfigError(f'{path}: is a {type(found).__name__}; expected an object')
  return found


def tokenizer_of(folder: pathlib.Path, config: Mapping[str, Any]) -> TokenizerFile:
  """Returns the tokenizer of a folder; nothing of it is read before it is built.

  Args:
    folder: that holds `tokenizer.json`, and in `tokenizer_config.json` what its special tokens are.
    config: of the model, whose ids of special tokens are taken where there is no such file.

  Raises:
    ConfigError: one of the files is damaged.
  """
  path = folder / 'tokenizer.json'
  settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
  tokens = {}
  for name in ('bos', 'eos', 'pad'):
    given = settings.get(f'{name}_token')
    tokens[name] = given.get('content') if isinstance(given, dict) else given
  if path.is_file() and (tokens['bos'] is None or tokens['eos'] is None):
    added = {entry['id']: entry['content'] for entry in read_json(path).get('added_tokens') or ()}
    for name in tokens:
      number = config.get(f'{name}_token_id')
      first = number[0] if isinstance(number, list) else number
      tokens[name] = tokens[name] or added.get(first)
  # Where a token is not known, building the tokenizer says so.
  return TokenizerFile(
    path=str(path), bos=tokens['bos'] or '', eos=tokens['eos'] or '', pad=tokens['pad']
  )


def template_of(folder: pathlib.Path) -> str | None:
  """Returns the chat template of a folder, or None where there is none.

  Of several, the one that is called `default` is taken.

  Args:
    folder: with a file of its own for it, or with `tokenizer_config.json`.

  Raises:
    ConfigError: a file is damaged.
  """
  if (folder / TEMPLATE).is_file():
    return (folder / TEMPLATE).read_text(encoding='utf-8')
  if not (folder / SETTINGS).is_file():
    return None
  found = read_json(folder / SETTINGS).get('chat_template')
  if isinstance(found, list):
    named = {entry.get('name'): entry.get('template') for entry in found if isinstance(entry, dict)}
    return named.get('default')
  return found
