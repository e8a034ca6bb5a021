"""The grammar of texts: what each annotation accepts, and what is said about the rest."""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, Optional, Protocol, Union

import pytest

from deepseek_jax.core.annotation import Presets
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.override import override_from_text


def config(cls):
  return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


@config
class MLA:
  heads: int = 8
  latent: int | None = 64


@config
class Window:
  size: int
  heads: int = 4


@config
class Files:
  pattern: str
  weight: float = 1.0
  inner: 'MLA | Window | None' = None


class Interface(Protocol):
  def build(self) -> int: ...


WIDE = MLA(heads=64, latent=512)
THIN = MLA(heads=1)

type Attention = MLA | Window
Plain = MLA | Window
type Pair[T] = tuple[T, T]


class Family:
  """A class that is no dataclass; its kinds are those derived from it."""


@config
class Small(Family):
  depth: int = 2


@config
class Root:
  count: int = 1
  rate: float = 0.5
  flag: bool = False
  name: str = 'x'
  maybe: int | None = None
  old_style: Optional[float] = None  # noqa: UP045
  maybe_name: str | None = None
  either: int | float = 1
  choice: Literal['dense', 'top-k', 3] = 'dense'
  betas: tuple[float, float] = (0.9, 0.95)
  sizes: tuple[int, ...] = (1, 2)
  names: tuple[str, ...] = ()
  noted: Annotated[int, 'a note'] = 1
  ragged: tuple[int, ...] | tuple[str, int] = ()
  attention: Attention = dataclasses.field(default_factory=MLA)
  plain: Union[Plain, None] = None  # noqa: UP007
  layers: tuple[Attention, ...] = (MLA(), Window(size=3))
  source: 'str | Files' = 'inside'
  files: Files = dataclasses.field(default_factory=lambda: Files(pattern='*'))
  family: Family = dataclasses.field(default_factory=Small)
  pair: Pair[int] = (1, 2)
  ready: Annotated[MLA, Presets(WIDE=WIDE, THIN=THIN)] = WIDE
  anything: Any = None
  interface: Interface | None = None
  call: Callable[[], int] | None = None


def value_of(path, text):
  new, _ = override_from_text(Root(), {path: text})
  for name in path.split('.'):
    new = getattr(new, name)
  return new


@pytest.mark.parametrize(
  ('path', 'text', 'value'),
  [
    ('count', '3', 3),
    ('count', ' 3 ', 3),
    ('count', '-3', -3),
    ('count', '+3', 3),
    ('count', '10_000', 10_000),
    ('count', '0x10', 16),
    ('count', '2**20', 2**20),
    ('count', '64*1024', 65536),
    ('count', '(1 + 2) * 3 - 10 // 3 % 2', 8),
    ('count', '-2**2', -4),
    ('rate', '3', 3.0),
    ('rate', '3e-4', 3e-4),
    ('rate', '1/4', 0.25),
    ('rate', '2**-1', 0.5),
    ('rate', 'inf', math.inf),
    ('rate', '-inf', -math.inf),
    ('rate', "float('inf')", math.inf),
    ('flag', 'True', True),
    ('flag', 'true', True),
    ('flag', 'false', False),
    ('name', 'word', 'word'),
    ('name', "'quoted'", 'quoted'),
    ('name', '"it\'s"', "it's"),
    ('name', 'data/*.txt', 'data/*.txt'),
    ('name', 'two words', 'two words'),
    ('name', '10', '10'),
    ('name', 'True', 'True'),
    ('name', "'None'", 'None'),
    ('name', 'a, b', 'a, b'),
    ('name', 'f(x)', 'f(x)'),
    ('name', r'\d+\.txt', r'\d+\.txt'),
    ('name', '', ''),
    ('maybe', '5', 5),
    ('maybe', 'None', None),
    ('old_style', '1', 1.0),
    ('maybe_name', 'None', None),
    ('maybe_name', 'n', 'n'),
    ('either', '2', 2),
    ('either', '2.0', 2.0),
    ('choice', 'top-k', 'top-k'),
    ('choice', 'dense', 'dense'),
    ('choice', "'dense'", 'dense'),
    ('choice', '3', 3),
    ('betas', '(0.9, 1)', (0.9, 1.0)),
    ('betas', '0.8,0.9', (0.8, 0.9)),
    ('betas', '[0.8, 0.9]', (0.8, 0.9)),
    ('sizes', '()', ()),
    ('sizes', '(2**3,)', (8,)),
    ('sizes', '1,2,3', (1, 2, 3)),
    ('names', "('a/*', b)", ('a/*', 'b')),
    ('noted', '7', 7),
    ('ragged', '(1, 2)', (1, 2)),
    ('ragged', '(a, 2)', ('a', 2)),
    ('pair', '(3, 4)', (3, 4)),
    ('attention', 'Window(size=128)', Window(size=128, heads=8)),
    ('attention', 'Window(128)', Window(size=128, heads=8)),
    ('attention', 'Window(128, 2)', Window(size=128, heads=2)),
    ('attention', 'MLA(latent=None)', MLA(latent=None)),
    ('attention', 'MLA', MLA()),
    ('plain', 'MLA', MLA()),
    ('plain', 'None', None),
    ('layers', '(MLA(heads=2), MLA, Window(1))', (MLA(heads=2), MLA(), Window(size=1))),
    ('layers', '(Window(1), MLA())', (Window(size=1), MLA())),
    ('layers.1', 'MLA(2)', MLA(heads=2)),
    ('source', 'Files("a/*.txt")', Files(pattern='a/*.txt')),
    ('source', 'data/*.txt', 'data/*.txt'),
    ('source', 'Files(pattern=word, inner=Window(2))', Files(pattern='word', inner=Window(size=2))),
    ('files', 'Files(weight=2)', Files(pattern='*', weight=2.0)),
    ('files.inner', 'MLA(heads=1)', MLA(heads=1)),
    ('family', 'Small(depth=3)', Small(depth=3)),
    ('ready', 'THIN', THIN),
    ('ready', 'THIN(latent=3)', MLA(heads=1, latent=3)),
    ('ready', 'THIN()', THIN),
    ('ready', 'MLA(heads=2)', MLA(heads=2, latent=512)),
  ],
)
def test_text_is_read_against_the_annotation(path, text, value):
  if path == 'layers.1':
    new, _ = override_from_text(Root(), {path: text})
    found = new.layers[1]
  else:
    found = value_of(path, text)
  assert found == value
  assert type(found) is type(value)
  if isinstance(value, tuple):
    assert [type(part) for part in found] == [type(part) for part in value]


def test_nan():
  assert math.isnan(value_of('rate', 'nan'))
  assert math.isnan(value_of('rate', "float('nan')"))


@pytest.mark.parametrize(
  ('path', 'text', 'message'),
  [
    ('count', '2.5', "count: '2.5' is not int"),
    ('count', '1e6', "count: '1e6' is not int; did you mean 1000000?"),
    ('count', 'True', "count: 'True' is not int"),
    ('count', 'None', "count: 'None' is not int"),
    ('count', 'abc', "count: 'abc' is not int"),
    ('count', '', "count: '' is not int"),
    ('count', '1 +', "count: '1 +' is not int"),
    ('count', "'3'", 'count: "\'3\'" is not int'),
    ('count', '(1,)', "count: '(1,)' is not int"),
    ('count', 'int(3)', "count: 'int(3)' is not int"),
    ('count', '1 / 0', "count: '1 / 0' is not int (division by zero)"),
    ('count', '9**9**9', "count: '9**9**9' is not int (too large)"),
    ('count', "'a' * 9", 'count: "\'a\' * 9" is not int'),
    ('count', '__import__("os")', 'count: \'__import__("os")\' is not int'),
    ('rate', '(-1) ** 0.5', "rate: '(-1) ** 0.5' is not float (not a real number)"),
    ('rate', 'True', "rate: 'True' is not float"),
    ('flag', '1', "flag: '1' is not bool"),
    ('flag', 'yes', "flag: 'yes' is not bool"),
    ('name', 'None', "name: 'None' is not str"),
    ('maybe', '2.5', "maybe: '2.5' is not int | None"),
    (
      'choice',
      'desne',
      "choice: 'desne' is not one of ['dense', 'top-k', 3]; did you mean `dense`?",
    ),
    ('choice', '4', "choice: '4' is not one of ['dense', 'top-k', 3]"),
    ('choice', 'top-', "choice: 'top-' is not one of ['dense', 'top-k', 3]"),
    ('betas', '(1, 2, 3)', "betas: '(1, 2, 3)' is not tuple[float, float]"),
    ('betas', '(1, x)', "betas.1: 'x' is not float"),
    ('sizes', '3', "sizes: '3' is not tuple[int, ...]; did you mean (3,)?"),
    ('ragged', '(None, 2)', "ragged: '(None, 2)' is not tuple[int, ...] | tuple[str, int]"),
    ('attention', 'HCA', 'attention: `HCA` is not one of [MLA, Window]'),
    ('attention', 'HCA(x=1)', 'attention: `HCA` is not one of [MLA, Window]'),
    ('attention', 'mla', 'attention: `mla` is not one of [MLA, Window]; did you mean `MLA`?'),
    (
      'attention',
      'Windwo(3)',
      'attention: `Windwo` is not one of [MLA, Window]; did you mean `Window`?',
    ),
    ('attention', '3', "attention: '3' is not one of [MLA, Window]"),
    ('attention', 'None', "attention: 'None' is not one of [MLA, Window]"),
    ('attention', 'a.MLA()', 'attention: `a.MLA` is not one of [MLA, Window]; did you mean `MLA`?'),
    ('plain', 'HCA', 'plain: `HCA` is not one of [MLA, Window, None]'),
    (
      'attention',
      'MLA(head=3)',
      'attention.head: `MLA` has no field `head`; did you mean `heads`?',
    ),
    ('attention', 'MLA(zz=3)', 'attention.zz: `MLA` has no field `zz`; it has heads, latent'),
    ('attention', 'MLA(heads=x)', "attention.heads: 'x' is not int"),
    ('attention', 'MLA(1, 2, 3)', 'attention: `MLA` has 2 fields, 3 values were given'),
    ('attention', 'MLA(1, heads=2)', 'attention.heads: `MLA` gets `heads` twice'),
    ('attention', 'MLA(**x)', 'attention: `x`: ** cannot be used here'),
    ('attention', 'Window', 'attention: `Window` needs a value for `size`'),
    ('source', 'Fiels(a)', 'source: `Fiels` is not one of [Files, str]; did you mean `Files`?'),
    ('files', 'Files(inner=HCA)', 'files.inner: `HCA` is not one of [MLA, Window, None]'),
    ('layers', '(MLA, HCA)', 'layers.1: `HCA` is not one of [MLA, Window]'),
    ('ready', 'THON', 'ready: `THON` is not one of [WIDE, THIN, MLA]; did you mean `THIN`?'),
    ('ready', 'THIN(x=1)', 'ready.x: `MLA` has no field `x`; it has heads, latent'),
    ('family', 'Samll', 'family: `Samll` is not one of [Small]; did you mean `Small`?'),
    (
      'anything',
      '3',
      "anything: '3' cannot be read for Any: no kind is in scope here; "
      'put the object in from Python',
    ),
    (
      'interface',
      'Foo()',
      "interface: 'Foo()' cannot be read for Interface | None: no kind is in scope here; "
      'put the object in from Python',
    ),
    (
      'call',
      'print',
      "call: 'print' cannot be read for collections.abc.Callable[[], int] | None: no kind is in "
      'scope here; put the object in from Python',
    ),
  ],
)
def test_wrong_text_is_explained(path, text, message):
  with pytest.raises(ConfigError) as caught:
    override_from_text(Root(), {path: text})
  assert caught.value.messages == (message,)


def test_all_faults_of_one_text():
  with pytest.raises(ConfigError) as caught:
    override_from_text(Root(), {'files': 'Files(pattern=1, weight=x, inner=Window(sz=1), more=2)'})
  assert set(caught.value.messages) == {
    "files.pattern: '1' is not str",
    "files.weight: 'x' is not float",
    'files.inner.sz: `Window` has no field `sz`; did you mean `size`?',
    'files.inner: `Window` needs a value for `size`',
    'files.more: `Files` has no field `more`; it has pattern, weight, inner',
  }


def test_a_kind_nobody_registered_can_be_named_while_it_is_there():
  @config
  class Mine:
    heads: int = 1
    taps: int = 2

  new, _ = override_from_text(Root(attention=Mine()), {'attention': 'Mine(heads=3)'})
  assert new.attention == Mine(heads=3)
  back, _ = override_from_text(new, {'attention': 'MLA'})
  assert back.attention == MLA(heads=3)
  anything, _ = override_from_text(Root(anything=Mine()), {'anything': 'Mine(taps=9)'})
  assert anything.anything == Mine(taps=9)
