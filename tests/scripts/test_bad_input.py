"""Bad input, tried: one clear message, exit code 2, no traceback, and nothing lost.

Each case is a command line and what its message must name: the field or file, what was found, and
what was expected. `{world}` is the folder of spoilt files, `{runs}` a copy of its runs, `{tmp}` an
empty folder.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = '--config={world}/runs/good/config.py'
FRESH = ('--workdir={tmp}/run', '--cache_dir={tmp}/cache')
TINY = '--config=configs/tiny_mla.py'
LONGEST = 3000
"""Characters of a message: a huge line in a file must not be repeated whole."""


def train(*arguments, config=SMALL):
  """A training command in a fresh folder."""
  return ('train', config, *FRESH, *arguments)


def change(*assignments, config=TINY):
  """A training command with changed parts, in a fresh folder."""
  return train(*(f'--config.{text}' for text in assignments), config=config)


def text(name):
  """A training command on one of the spoilt texts."""
  return change(f'data.source=TextFiles("{{world}}/text/{name}")', config=SMALL)


def pairs(name, prompt='prompt', completion='completion'):
  """A training command on one of the spoilt files of prompts and completions."""
  keys = f'prompt="{prompt}", completion="{completion}"'
  return change(f'data.source=Pairs("{{world}}/text/{name}", {keys})', config=SMALL)


def tokenizer(name, bos='<|bos|>', eos='<|eos|>'):
  """A training command with one of the spoilt tokenizers."""
  path = f'{{world}}/tokenizers/{name}'
  return change(
    f'data.tokenizer=TokenizerFile(path="{path}", bos="{bos}", eos="{eos}")', config=SMALL
  )


def resume(name, *arguments):
  """A training command in one of the runs that are there."""
  return ('train', SMALL, f'--workdir={{runs}}/{name}', '--cache_dir={tmp}/cache', *arguments)


def config(name, script='inspect_config'):
  """A command with one of the spoilt config files."""
  return (script, f'--config={{world}}/configs/{name}.py')


def generate(name, *arguments):
  """A generation command on one of the runs."""
  return ('generate', f'--workdir={{runs}}/{name}', '--prompt=we', *arguments)


def evaluate(name, *arguments):
  """An evaluation command on one of the runs."""
  return ('evaluate', f'--workdir={{runs}}/{name}', '--cache_dir={tmp}/cache', *arguments)


CASES = {
  # The command line.
  'unknown flag': (train('--worksir=x'), 'worksir', 'workdir'),
  'unknown flag of evaluate': (('evaluate', '--stepp=3'), 'stepp', 'step'),
  'a word too many': (train('quick'), "unexpected argument 'quick'"),
  'no config': (('train', '--workdir={tmp}/run'), '--config is missing'),
  'no config to inspect': (('inspect_config',), '--config is missing'),
  'no workdir': (('train', SMALL), '--workdir is missing'),
  'no workdir to generate from': (('generate',), '--workdir is missing'),
  'no workdir to evaluate': (('evaluate',), '--workdir is missing'),
  'config twice': (train(TINY), 'given twice'),
  'field without a value': (('train', SMALL, '--config.seed'), '--config.seed needs a value'),
  'no field': (train('--config.=3'), 'names no field'),
  'display of no kind': (train('--display=loud'), 'display', 'loud', 'quiet'),
  'step is no number': (('evaluate', '--step=last'), 'step', 'last'),
  # Config files.
  'config misspelt': (('train', '--config=configs/tiny_mlaa.py'), 'tiny_mlaa', 'tiny_mla.py'),
  'config nowhere': (('train', '--config={tmp}/no/such.py'), '{tmp}/no'),
  'config is a folder': (('train', '--config=configs/'), 'configs'),
  'config raises': (config('raises'), 'raises.py:2', 'ZeroDivisionError'),
  'config refuses': (config('refuses'), 'refuses.py:6', '`top_k` is 3', '2 `experts`'),
  'config has no function': (config('nothing'), 'get_config', 'get_konfig'),
  'config is a dict': (config('a_dict'), 'a_dict.py', 'depth', 'not a config'),
  'config is a part': (config('a_part', 'train'), 'expected an Experiment', 'AdamW'),
  'config to inspect is a part': (config('a_part'), 'expected an Experiment', 'AdamW'),
  'config breaks the syntax': (config('syntax'), 'syntax.py:2', 'SyntaxError', 'never closed'),
  'config imports nothing': (config('imports'), 'imports.py:1', 'no_such_module_at_all'),
  'config leaves': (config('exits'), 'exits.py:5', 'SystemExit'),
  'config is binary': (config('binary'), 'binary.py', 'null bytes'),
  'config to compare is missing': (
    ('inspect_config', TINY, '--against={tmp}/none.py'), 'no config file', '{tmp}/none.py'
  ),
  # Fields, types and kinds.
  'unknown field': (change('model.depht=3'), 'depht', 'did you mean `depth`'),
  'unknown part': (change('modle.depth=3'), 'modle', 'did you mean `model`'),
  'unknown inner field': (change('model.attention.head=3'), 'MLA', 'head', '`heads`'),
  'fraction for a count': (change('model.depth=2.5'), 'model.depth', '2.5', 'int'),
  'word for a count': (change('model.depth=two'), 'model.depth', 'two', 'int'),
  'word for a number': (change('optimizer.peak_lr=fast'), 'optimizer.peak_lr', 'fast', 'float'),
  'none for a count': (change('model.depth=None'), 'model.depth', 'None', 'int'),
  'text for a tuple': (change('prompts=3'), 'prompts', '3', 'tuple'),
  'unknown kind': (change('model.attention=Linear()'), 'Linear', 'MLA, MHA, Window, Gated, TopK'),
  'misspelt kind': (change('model.attention=Windo(size=3)'), 'Windo', 'Window'),
  'unknown field of a kind': (change('model.attention=Window(sizes=3)'), 'sizes', '`size`'),
  'kind of another part': (change('optimizer=MLA(heads=2)'), 'optimizer', 'MLA', 'AdamW'),
  'kind not closed': (change('model.attention=Window(size='), 'model.attention', 'Window(size='),
  'a program for a value': (change('seed=__import__("os").getpid()'), 'seed', '__import__'),
  'field of an absent part': (change('model.mtp=None', 'model.mtp.depth=2'), 'model.mtp'),
  'misspelt remat': (change('remat=Compresed()'), 'remat', 'Compresed', 'Compressed'),
  'misspelt rules': (change('rules=FDSP'), 'rules', 'FDSP', 'FSDP'),
  'unknown mesh axis in the rules': (change('rules.batch=("dataa",)'), 'rules', 'dataa', 'data'),
  # Sizes.
  'more choices than experts': (change('model.feed_forward.top_k=9'), '`top_k` is 9', '8'),
  'groups that do not divide': (
    change('model.feed_forward.router.groups=3'), '`groups` is 3', '8 experts'
  ),
  'groups that leave too few': (
    change('model.feed_forward.top_k=5', 'model.feed_forward.router=Sigmoid(groups=4)'),
    '`kept_groups` 1', '2 experts', '5',
  ),
  'no layer': (change('model.depth=0', 'model.dense_layers=0'), '`depth` is 0', '1 or more'),
  'more dense layers than layers': (change('model.dense_layers=4'), '`dense_layers` is 4', '3'),
  'odd rotation': (change('model.attention.rope_dim=3'), '`rope_dim` is 3', 'even'),
  'no head': (change('model.attention.heads=0'), '`heads` is 0', '1 or more'),
  'empty window': (change('model.attention=Window(size=0)'), '`size` is 0', 'at least'),
  'no row': (change('data.batch_size=0'), 'batch_size', 'at least 1', '0'),
  'no length': (change('data.length=0'), 'length', 'at least 1', '0'),
  'no step': (change('train_steps=0'), '`train_steps` is 0', '1 or more'),
  'negative seed': (change('seed=-1'), '`seed` is -1', '0 to'),
  'warm-up beyond the end': (change('train_steps=3'), 'schedule', 'warmup_steps', '3'),
  'no cadence': (change('cadence.log=0'), '`log` is 0', '1 or more'),
  'empty block of remat': (change('remat=Compressed(block=0)'), '`block` is 0', '1 or more'),
  'remat saves what is not marked': (
    change('remat=Save(names=("atention",))'), 'atention', 'attention, feed_forward'
  ),
  'guard that stops at once': (change('guard.stop_after=0'), '`stop_after` is 0', '1 or more'),
  'guard without memory': (change('guard.spike.decay=1.0'), 'decay', '1.0', '[0, 1)'),
  'average of nothing': (change('ema=EMA(decay=1.5)'), 'decay', '1.5'),
  'scale of no power of 2': (
    change('precision=Float16(scaling=Static(scale=3.0))'), 'Static.scale', '3.0', 'power of two'
  ),
  'unknown precision': (change('precision=Float8()'), 'precision', 'Float8', 'BFloat16'),
  'vocabulary too small': (change('model.vocab=100'), 'model.vocab is 100', '259', 'Bytes'),
  'microbatches that do not divide': (
    change('microbatches=3'), '`microbatches` is 3', 'data.batch_size 8'
  ),
  'mesh of other devices': (change('mesh.data=3'), 'mesh', '3 devices', 'there are 8'),
  'mesh that does not divide': (change('mesh.model=3'), 'mesh', '8 devices', '3'),
  'rows that the mesh does not divide': (
    change('data.batch_size=12'), 'data.batch_size 12', '8 devices'
  ),
  'microbatches that the mesh does not divide': (
    change('data.batch_size=16', 'microbatches=4'), '4 rows in each of 4 microbatches', '8 devices'
  ),
  'heads that the mesh does not divide': (
    change('rules=TENSOR', 'mesh.model=8', 'model.attention.heads=6'),
    'attention/query_up', 'not divisible by the 8 devices',
  ),
  'experts that the mesh does not divide': (
    change('rules=EXPERT', 'mesh.expert=8', 'model.feed_forward.experts=12'),
    'feed_forward', 'not divisible by the 8 devices',
  ),
  'length that the mesh does not divide': (
    change('rules.seq=("seq",)', 'mesh.seq=8', 'data.length=30', 'rules.batch=()'),
    'data.length is 30', '8 devices',
  ),
  # Text.
  'no such text': (text('goood.txt'), 'goood.txt', 'did you mean good.txt'),
  'home is not expanded': (
    change('data.source=TextFiles("~/a.txt")', config=SMALL), '~ is not expanded'
  ),
  'text is a folder': (text('same'), 'is a folder', '*.txt'),
  'text of another ending': (text('table.csv'), 'table.csv', '.txt or .jsonl'),
  'empty text': (text('empty.txt'), 'empty.txt', 'empty'),
  'blank text': (text('blank.txt'), 'blank.txt', 'empty'),
  'binary text': (text('binary.txt'), 'binary.txt', 'binary data', 'byte 5'),
  'badly encoded text': (text('latin.txt'), 'latin.txt', 'not UTF-8 at byte 1', '0xf9'),
  'text in UTF-16': (text('utf16.txt'), 'utf16.txt', 'UTF-16; expected UTF-8'),
  'one letter': (text('letter.txt'), 'letter.txt', 'one character'),
  'copies alone': (text('same/*.txt'), 'same', 'same text', 'at least two'),
  'cut archive': (text('cut.txt.gz'), 'cut.txt.gz'),
  'no archive': (text('not.txt.xz'), 'not.txt.xz'),
  'broken record': (text('broken.jsonl'), 'broken.jsonl:2', 'not JSON at column'),
  'huge broken record': (text('huge.jsonl'), 'huge.jsonl:2', 'not JSON at column'),
  'deep record': (text('deep.jsonl'), 'deep.jsonl:1', 'not JSON'),
  'record of other keys': (text('keys.jsonl'), 'keys.jsonl:1', "'text'", "did you mean 'txet'"),
  'record is a list': (text('list.jsonl'), 'list.jsonl:1', 'expected a JSON object', 'list'),
  'text is a number': (text('number.jsonl'), 'number.jsonl:1', "'text' is int", 'expected a text'),
  'half a character': (text('surrogate.jsonl'), 'surrogate.jsonl:1', 'surrogate'),
  'pair without prompt': (pairs('keys.jsonl'), 'keys.jsonl:1', "no field 'prompt'"),
  'pair with nothing to learn': (pairs('no_answer.jsonl'), 'no_answer.jsonl:2', "'completion'"),
  'pair whose prompt is a number': (
    pairs('number_prompt.jsonl'), 'number_prompt.jsonl:1', "'prompt' is int", 'expected a text'
  ),
  'broken pair': (pairs('broken.jsonl', 'text', 'b'), 'broken.jsonl:1', "'b'"),
  'pairs in a text': (pairs('good.txt'), 'good.txt', '.jsonl'),
  'one key for both': (pairs('keys.jsonl', 'text', 'text'), 'two keys', "'text'"),
  'no record has text': (text('no_text.jsonl'), 'no_text.jsonl', 'no record'),
  'all is held out': (
    change('data.source.heldout_fraction=1.5', config=SMALL), 'heldout_fraction', '1.5', '0 and 1'
  ),
  # Tokenizers.
  'no tokenizer': (tokenizer('none.json'), 'data.tokenizer', 'none.json'),
  'cut tokenizer': (tokenizer('cut.json'), 'data.tokenizer', 'cut.json'),
  'tokenizer of another format': (tokenizer('other.json'), 'data.tokenizer', 'other.json'),
  'binary tokenizer': (tokenizer('binary.json'), 'data.tokenizer', 'binary.json'),
  'empty tokenizer': (tokenizer('empty.json'), 'data.tokenizer', 'empty.json'),
  'tokenizer without the token': (
    tokenizer('whole.json', bos='<s>'), 'data.tokenizer', '<s>', 'whole.json'
  ),
  'tokenizer too large': (tokenizer('whole.json'), 'model.vocab is 264', '8192', 'TokenizerFile'),
  # Workdirs.
  'workdir is a file': (resume('a_file'), 'a_file is a file; expected a folder'),
  'workdir below a file': (resume('a_file/run'), 'a_file/run', 'Not a directory'),
  'workdir is a broken link': (resume('nowhere'), 'nowhere'),
  'workdir of something else': (resume('foreign'), 'foreign', 'not empty', 'no config.json'),
  'cache is a file': (
    ('train', SMALL, '--workdir={tmp}/run', '--cache_dir={runs}/a_file'), 'a_file'
  ),
  'cache below a file': (
    ('train', SMALL, '--workdir={tmp}/run', '--cache_dir={runs}/a_file/cache'), 'a_file/cache'
  ),
  'config of the run is cut': (resume('not_json'), 'not_json/config.json', 'not JSON'),
  'config of the run is a list': (resume('a_list'), 'a_list/config.json'),
  'config of the run is no run': (resume('no_experiment'), 'no_experiment/config.json'),
  'config of the run is binary': (resume('binary'), 'binary/config.json', 'not JSON'),
  'config of another version': (resume('older'), 'older/config.json', 'micro_batches'),
  'another model': (
    resume('good', '--config.model.width=32'), 'model.width', '16', '32', 'another --workdir'
  ),
  'another kind': (
    resume('good', '--config.model.attention=Window(size=8)'), 'model.attention', 'MLA', 'Window'
  ),
  'another seed': (resume('good', '--config.seed=3'), 'seed', '0', '3', 'cannot change'),
  'another grouping of layers': (
    resume('good', '--config.model.depth=9'), 'model.depth', '2', '9', 'cannot change'
  ),
  # Checkpoints.
  'checkpoint cut': (generate('cut'), 'cut/checkpoints/1', 'is damaged'),
  'checkpoint to evaluate cut': (evaluate('cut'), 'cut/checkpoints/1', 'is damaged'),
  'checkpoint to go on from cut': (
    resume('cut'), 'cut/checkpoints/1', 'damaged', 'nothing was changed'
  ),
  'nothing to begin with': (
    change('init_from=InitFrom("nowhere")', config=SMALL), 'init_from', 'nowhere', 'no checkpoint'
  ),
  'weights to begin with that are not kept': (
    train('--config.init_from=InitFrom("{runs}/good",weights="averaged")'),
    'init_from', 'good/checkpoints/1', 'no averaged weights',
  ),
  'checkpoint of other weights': (
    generate('other_weights'), 'other_weights/checkpoints/1', 'float32[264, 24]', '[264, 16]'
  ),
  'checkpoint of other weights to evaluate': (
    evaluate('other_weights'), 'other_weights/checkpoints/1', 'float32[264, 24]', '[264, 16]'
  ),
  'no averaged weights': (generate('good', '--weights=averaged'), 'checkpoints/1', 'averaged'),
  'no such checkpoint': (generate('good', '--step=7'), 'no checkpoint of step 7', 'there are 1'),
  'no such checkpoint to evaluate': (evaluate('good', '--step=7'), 'of step 7', 'there are 1'),
  'checkpoint 0': (evaluate('good', '--step=0'), 'of step 0', 'there are 1'),
  'no checkpoint yet': (generate('unstarted'), 'unstarted', 'no checkpoint'),
  'no checkpoint yet to evaluate': (evaluate('unstarted'), 'unstarted', 'no checkpoint'),
  'nothing to generate from': (generate('none'), 'runs/none'),
  'nothing to evaluate': (evaluate('none'), 'runs/none', 'no run here'),
  'a file to generate from': (generate('a_file'), 'runs/a_file'),
  'a file to evaluate': (evaluate('a_file'), 'runs/a_file is a file'),
  # Sampling.
  'negative temperature': (
    generate('good', '--temperature=-1'), 'Sample.temperature', '-1.0', 'above 0'
  ),
  'top_p beyond 1': (generate('good', '--top_p=2'), 'Sample.top_p', '2.0', '(0, 1]'),
  'no top_k': (generate('good', '--top_k=0'), 'Sample.top_k', 'found 0', 'at least 1'),
  'negative tokens': (generate('good', '--tokens=-4'), 'tokens', '-4'),
  'seed too large': (generate('good', f'--seed={2**40}'), 'seed', str(2**40)),
}  # fmt: skip


def digest(folder: pathlib.Path) -> dict[str, str]:
  """Returns a hash of every file below a folder."""
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def check(code: int, errors: str, expected: list[str]) -> None:
  """One message that says it all, and the exit code."""
  assert code == 2, errors
  assert 'Traceback' not in errors
  assert errors.count('error: ') == 1, errors
  message = errors.partition('error: ')[2]
  for part in expected:
    assert part in message, f'{part!r} is not in: {message[:LONGEST]}'
  assert len(errors) < LONGEST


def places(case, world, tmp_path):
  """Fills the folders in, and returns the command and what is expected."""
  (tmp_path / 'empty').mkdir()
  fill = {'world': str(world), 'runs': str(tmp_path / 'runs'), 'tmp': str(tmp_path / 'empty')}
  (script, *arguments), *expected = CASES[case]
  if any('{runs}' in argument for argument in arguments):
    shutil.copytree(world / 'runs', tmp_path / 'runs', symlinks=True)

  def put(words):
    for name, path in fill.items():
      words = [word.replace(f'{{{name}}}', path) for word in words]
    return words

  return script, put(arguments), put(expected)


@pytest.mark.parametrize('case', CASES)
def test_bad_input(case, world, tmp_path, run_script):
  script, arguments, expected = places(case, world, tmp_path)
  before, runs = digest(world), digest(tmp_path)
  outcome = run_script(script, *arguments)
  check(outcome.code, outcome.errors, expected)
  assert digest(world) == before
  after = digest(tmp_path)
  assert {name: after.get(name) for name in runs} == runs


def test_there_are_enough_cases():
  assert len(CASES) >= 60


PROCESSES = (
  'unknown field',
  'config misspelt',
  'more choices than experts',
  'badly encoded text',
  'workdir of something else',
  'another model',
  'checkpoint cut',
)


@pytest.mark.parametrize('case', PROCESSES)
def test_bad_input_in_a_process(case, world, tmp_path):
  """What the tests above run in this process is what a process prints."""
  script, arguments, expected = places(case, world, tmp_path)
  runs = digest(tmp_path)
  environ = {**os.environ, 'PYTHONPATH': str(ROOT)}
  result = subprocess.run(
    [sys.executable, f'scripts/{script}.py', *arguments],
    cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=300,
  )  # fmt: skip
  check(result.returncode, result.stderr, expected)
  after = digest(tmp_path)
  assert {name: after.get(name) for name in runs} == runs


def test_a_failed_start_binds_nobody(world, tmp_path, run_script):
  """After a misspelt path the same folder takes the right one: nothing was trained yet."""
  first = run_script(
    'train', SMALL.replace('{world}', str(world)), f'--workdir={tmp_path}/run',
    f'--cache_dir={tmp_path}/cache', '--config.data.source=TextFiles("nowhere.txt")',
  )  # fmt: skip
  assert first.code == 2
  second = run_script(
    'train', SMALL.replace('{world}', str(world)), f'--workdir={tmp_path}/run',
    f'--cache_dir={tmp_path}/cache',
    f'--config.data.source=TextFiles("{world}/text/empty.txt")',
  )  # fmt: skip
  assert second.code == 2
  assert 'empty.txt: the file is empty' in second.errors


def test_a_prompt_that_is_no_text(world):
  """Standard input that is not UTF-8 is refused before a model is loaded."""
  result = subprocess.run(
    [sys.executable, 'scripts/generate.py', f'--workdir={world}/runs/good'],
    cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, input=b'caf\xe9 au lait',
    capture_output=True, check=False, timeout=300,
  )  # fmt: skip
  check(result.returncode, result.stderr.decode(), ['standard input', 'not UTF-8 at byte 3'])
