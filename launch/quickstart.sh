#!/usr/bin/env bash
# usage: ./launch/quickstart.sh [flags of ma_rlhf_jax.train]
#
# Makes the virtual environment and runs the main job: SFT, reward model and
# macro-action PPO on a small synthetic task. Needs Python >= 3.11 and pip.
#
# flags:
#   --config=RECIPE           The recipe. Default: configs/tiny.py, which
#                             downloads nothing.
#   --config.FIELD=VALUE      Overrides a field of the config, as in
#                             --config.ppo.kl_coef=0.1.
#   --workdir=DIR             The folder that everything is written to. Default:
#                             runs/NAME-HASH, by the recipe and its config.
#   -h, --help                Prints this text.
#
# Once the environment is made, `.venv/bin/python -m ma_rlhf_jax.train --help`
# shows all flags. Variables: PYTHON is the interpreter to make it with
# (default: the first that fits on PATH), MA_RLHF_VENV its folder (default:
# .venv).
#
# Exit codes: those of ma_rlhf_jax.train; 1 where there can be no environment.
#
# examples:
#   ./launch/quickstart.sh
#   ./launch/quickstart.sh --config=configs/tiny.py:paper --workdir=runs/paper
set -euo pipefail
# shellcheck source=launch/setup_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
answer_help "$@"

ensure_venv
exec "$VENV_PYTHON" -m ma_rlhf_jax.train "$@"
