"""How does a dense model become a sparse one: with a warm-up of the indexer, or at once?

python scripts/train.py --config=experiments/indexer_stages/dense.py --workdir=runs/dense
python scripts/train.py --config=experiments/indexer_stages/warm_up.py --workdir=runs/warm_up
python scripts/sweep.py --experiment=experiments/indexer_stages/sweep.py --output=runs/indexer
"""

from deepseek_jax.core.override import override
from deepseek_jax.core.sweep import Sweep, chain, product, seeds
from deepseek_jax.layers.attention.sparse import DSA
from deepseek_jax.layers.attention.top_k import TopK
from deepseek_jax.layers.attention.window import Window
from deepseek_jax.optim.schedule import Constant
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.init_from import InitFrom
from experiments.attention_kinds.sweep import ATTENTION, LATENT
from experiments.indexer_stages import dense, warm_up

baseline = 'dense'
STEPS = 60
"""Of adaptation: a fifth of what the dense model was trained for."""
EVALUATE_ONCE = {'cadence.evaluate': 1, 'cadence.save': 1}


def base() -> Experiment:
  """Returns the dense model, which goes on for some steps at a tenth of its learning rate."""
  changes = {
    'name': 'indexer_stages',
    'train_steps': STEPS,
    'cadence.evaluate': STEPS // 2,
    'cadence.save': STEPS // 2,
    'optimizer.peak_lr': 4e-4,
    'init_from': InitFrom('runs/dense'),
  }
  return override(dense.get_config(), changes)[0]


def variants() -> Sweep:
  """Returns the ways; sparse ones see 32 of up to 512 tokens.

  Those called `…_at_once` take a step of next to nothing: the kinds as they are put on.
  """
  sparse = DSA(**LATENT, indexer=warm_up.INDEXER, top_k=warm_up.TOP_K)
  ways = {
    'cold': {ATTENTION: sparse},
    'warmed': {ATTENTION: sparse, 'init_from': InitFrom('runs/warm_up')},
    'top_k': {ATTENTION: TopK(**LATENT, top_k=warm_up.TOP_K)},
    'window': {ATTENTION: Window(**LATENT, size=warm_up.TOP_K, sinks=0)},
  }
  nothing = {'train_steps': 1, 'optimizer.peak_lr': 1e-12, 'schedule': Constant(), **EVALUATE_ONCE}
  at_once = {f'{name}_at_once': {**way, **nothing} for name, way in ways.items()}
  return product(chain(dense={}, **ways, **at_once), seeds(3))
