#!/usr/bin/env bash
# Makes the environment and runs all tests but the slow ones, with three workers for every two cores, at most 8: tests
# that start processes wait for them much of the time.
#
#   ./launch/test.sh [pytest arguments]      such as: ./launch/test.sh -x tests/conversion
#   ./launch/test.sh -m ""                   slow ones too; test_slow.sh runs these alone
#
# Without workers (-n 0) it can show output as it comes (-s). So runs what an argument names by file, slow or not.
#
# Exit status: pytest's, or 3 to 6 when the set-up failed (see setup_env.sh).

set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

# shellcheck source=setup_env.sh
source "$here/setup_env.sh"
cd -- "$here/.."
workers=$((($(nproc) * 3 + 1) / 2))
export PYTEST_XDIST_AUTO_NUM_WORKERS="${PYTEST_XDIST_AUTO_NUM_WORKERS:-$((workers < 8 ? workers : 8))}"
# A worker that has no tests left takes over some of another's.
options=(-n auto --dist worksteal -m "not slow")
for argument; do
    [[ "$argument" != *.py* ]] || options=(-n 0)
done
exec "$MEGATRON_ADS_VENV/bin/python" -m pytest "${options[@]}" "$@"
