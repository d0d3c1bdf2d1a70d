#!/usr/bin/env bash
# Makes the environment and runs all tests, with as many workers as the machine has cores, at most 8.
#
#   ./launch/test.sh [pytest arguments]      such as: ./launch/test.sh -x tests/conversion
#
# Without workers (-n 0) it can show output as it comes (-s). So runs what an argument names by file.
#
# Exit status: pytest's, or 3 to 6 when the set-up failed (see setup_env.sh).

set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

# shellcheck source=setup_env.sh
source "$here/setup_env.sh"
cd -- "$here/.."
cores="$(nproc)"
export PYTEST_XDIST_AUTO_NUM_WORKERS="${PYTEST_XDIST_AUTO_NUM_WORKERS:-$((cores < 8 ? cores : 8))}"
# A worker that has no tests left takes over some of another's.
workers=(-n auto --dist worksteal)
for argument; do
    [[ "$argument" != *.py* ]] || workers=(-n 0)
done
exec "$MEGATRON_ADS_VENV/bin/python" -m pytest "${workers[@]}" "$@"
