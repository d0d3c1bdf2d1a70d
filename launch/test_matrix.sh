#!/usr/bin/env bash
# Runs all tests at the newest end of what is supported: Python 3.12 with Megatron-Core 0.19.2, in an environment of its
# own (test.sh is the oldest end, where there is a Python 3.11). Not part of any automatic check: run it before a release.
#
#   ./launch/test_matrix.sh [pytest arguments]      such as: ./launch/test_matrix.sh tests/models
#
# Settings, all optional, from the environment; those of setup_env.sh hold too:
#   MEGATRON_ADS_PYTHON          a Python 3.12 or 3.13              (default: python3.12, or pyenv's newest 3.12)
#   MEGATRON_ADS_VENV            where the environment is made      (default: .venv-matrix next to setup.py)
#   MEGATRON_ADS_MATRIX_SECONDS  after which the tests are ended    (default: 5400)
#
# Exit status: pytest's, 124 when the time is up, or 3 to 6 when the set-up failed (see setup_env.sh).

set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

if [[ -z "${MEGATRON_ADS_PYTHON:-}" ]]; then
    MEGATRON_ADS_PYTHON=python3.12
    for candidate in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python; do
        [[ ! -x "$candidate" ]] || MEGATRON_ADS_PYTHON="$candidate"
    done
fi
export MEGATRON_ADS_PYTHON MEGATRON_ADS_VENV="${MEGATRON_ADS_VENV:-${here%/*}/.venv-matrix}"
# shellcheck source=setup_env.sh
(source "$here/setup_env.sh") # before the time limit: the first set-up downloads several GB
"$MEGATRON_ADS_VENV/bin/python" -c 'import sys; from importlib.metadata import version as of
print("python", sys.version.split()[0], *(f"{name} {of(name)}" for name in ("megatron-core", "torch", "transformers")))'
exec timeout --kill-after=30 "${MEGATRON_ADS_MATRIX_SECONDS:-5400}" "$here/test.sh" -m "" "$@"
