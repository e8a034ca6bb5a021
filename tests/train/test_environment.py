"""What is noted of the machine, and what is not."""

import getpass
import json
import socket
import subprocess

import jax

from deepseek_jax.train import environment


def test_the_machine_is_described_and_nobody_is_named(tmp_path):
  environ = {
    'XLA_FLAGS': '--xla_a=3 --xla_dump_to=/somewhere/ann',
    'JAX_PLATFORMS': 'cpu',
    'SECRET': 'hush',
    'JAX_ENABLE_X64': '',
  }
  found = environment.collect(environ, tmp_path)
  assert found['versions']['jax'] == jax.__version__
  assert found['devices']['devices'] == ['8 × cpu: cpu']
  assert found['machine']['cores'] >= 1
  assert found['variables'] == {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_a=3 --xla_dump_to=(path)',
  }
  assert 'source' not in found
  words = json.dumps(found)
  assert 'hush' not in words
  for name in (socket.gethostname(), getpass.getuser()):
    assert f'"{name}"' not in words


def test_the_commit_of_a_checkout(tmp_path):
  git = ['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=b']
  for words in (['init', '-q'], ['commit', '-q', '--allow-empty', '-m', 'first']):
    subprocess.run([*git, *words], check=True)
  found = environment.collect({}, tmp_path)['source']
  assert len(found['commit']) == 40
  assert found['changes'] == 'none'
  (tmp_path / 'a').touch()
  subprocess.run([*git, 'add', 'a'], check=True)
  assert environment.collect({}, tmp_path)['source']['changes'] == 'not committed'
  (tmp_path / '.git' / 'HEAD').unlink()
  assert 'source' not in environment.collect({}, tmp_path)


def test_another_machine_on_resuming_is_kept_beside_the_first(tmp_path):
  path = tmp_path / 'environment.json'
  assert environment.read(path) == {}
  for cores in (2, 2, 8, 4):
    environment.write(path, {'machine': {'cores': cores}})
  assert environment.read(path) == {
    'machine': {'cores': 4},
    'earlier': [{'machine': {'cores': 2}}, {'machine': {'cores': 8}}],
  }
  path.write_text('{broken')
  environment.write(path, {'machine': {'cores': 1}})
  assert environment.read(path) == {'machine': {'cores': 1}}
