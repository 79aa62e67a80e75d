#!/usr/bin/env bash
# The main job: SFT, reward model and macro-action PPO on a small synthetic
# task, with all its set-up. Needs Python >= 3.11 and pip.
#
#   ./launch/quickstart.sh [arguments of ma_rlhf_jax.train]
#
# Without --config it runs the recipe configs/tiny.py, which downloads nothing.
# The environment: see setup_venv.sh.
set -euo pipefail
# shellcheck source=launch/setup_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

ensure_venv
exec "$VENV_PYTHON" -m ma_rlhf_jax.train "$@"
